//! From a URL and settings to a store.
//!
//! Settings are one map. Keys in capitals are environment variables, handed in by the program: those that the provider's
//! own tools read are used, others are passed over. Keys in lower case were written by somebody for this store: they win,
//! and one that is not known is an error. The names are those of the crate `object_store`, which are those of the
//! providers' tools.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::list::PaginatedListStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path as ObjectPath;
use object_store::{ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};

use super::wire::WatchingConnector;
use super::{connection, profile};
use crate::{StoreError, file_url_path};

/// A store and what it can do beyond the common interface.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) url: String,
    pub(super) provider: Provider,
    /// What all keys begin with, without a slash at the end.
    pub(super) prefix: String,
    pub(super) store: Arc<dyn ObjectStore>,
    /// Uploads in parts.
    pub(super) parts: Option<Parts>,
    /// Listings page by page.
    pub(super) pages: Option<Pages>,
    /// The folder, for a local one.
    pub(super) folder: Option<PathBuf>,
    /// Where credentials were looked for, in that order, for messages.
    pub(super) credentials: Vec<String>,
}

/// Who keeps the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provider {
    Local,
    Memory,
    S3,
    Gcs,
    Azure,
    Http,
    /// A store that was handed in.
    Other,
}

impl Provider {
    /// The name in the table of prices.
    pub(super) fn scheme(self) -> &'static str {
        match self {
            Provider::Local => "file",
            Provider::Memory => "memory",
            Provider::S3 => "s3",
            Provider::Gcs => "gs",
            Provider::Azure => "az",
            Provider::Http => "http",
            Provider::Other => "",
        }
    }
}

/// Uploads in parts; the trait asks for no `Debug`.
pub(super) struct Parts(pub(super) Arc<dyn MultipartStore>);

/// Listings page by page; the trait asks for no `Debug`.
pub(super) struct Pages(pub(super) Arc<dyn PaginatedListStore>);

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parts")
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pages")
    }
}

/// Schemes and what they mean, for the error of an unknown one.
const SCHEMES: &str = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, http(s)://…, file:///folder, \
                       memory: or a path";

pub(super) fn open(url: &str, settings: &BTreeMap<String, String>) -> Result<Backend, StoreError> {
    if matches!(url, "memory:" | "memory://" | "memory:///") {
        return Ok(memory(url));
    }
    if let Some(path) = file_url_path(url) {
        return local(url, &path?);
    }
    let Some((scheme, rest)) = url.split_once("://") else { return local(url, Path::new(url)) };
    let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/');
    if authority.is_empty() {
        let reason = format!("nothing stands between `{scheme}://` and the next `/`; write {SCHEMES}");
        return Err(StoreError::Url { url: url.to_owned(), reason });
    }
    // A bad prefix is better found here than at the first object.
    ObjectPath::parse(prefix).map_err(|e| StoreError::Url { url: url.to_owned(), reason: e.to_string() })?;
    match scheme {
        "s3" | "s3a" => s3(url, prefix, settings),
        "gs" => gcs(url, prefix, settings),
        "az" | "abfs" | "abfss" => azure(url, prefix, settings),
        "http" | "https" => http(url, settings),
        _ => {
            let reason = format!("the scheme `{scheme}` is not known; write {SCHEMES}");
            Err(StoreError::Url { url: url.to_owned(), reason })
        }
    }
}

/// A store that was handed in.
pub(super) fn over(store: Arc<dyn ObjectStore>) -> Backend {
    Backend { url: store.to_string(), ..backend("", Provider::Other, "", store) }
}

fn backend(url: &str, provider: Provider, prefix: &str, store: Arc<dyn ObjectStore>) -> Backend {
    Backend {
        url: url.trim_end_matches('/').to_owned(),
        provider,
        prefix: prefix.to_owned(),
        store,
        parts: None,
        pages: None,
        folder: None,
        credentials: Vec::new(),
    }
}

fn memory(url: &str) -> Backend {
    let store = Arc::new(InMemory::new());
    Backend { parts: Some(Parts(store.clone())), ..backend(url, Provider::Memory, "", store) }
}

fn local(url: &str, folder: &Path) -> Result<Backend, StoreError> {
    let unusable = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
        dir: folder.display().to_string(),
        source,
    };
    if folder.as_os_str().is_empty() {
        return Err(StoreError::Url { url: url.to_owned(), reason: format!("it is empty; write {SCHEMES}") });
    }
    let folder = std::path::absolute(folder).map_err(|e| unusable(e.into()))?;
    if folder.exists() && !folder.is_dir() {
        return Err(unusable("it is not a folder".into()));
    }
    // The root is that of the file system: a folder that does not exist yet is made by the first write, not by a look.
    let prefix = ObjectPath::from_absolute_path(&folder).map_err(|e| unusable(e.into()))?;
    // Synced writes: what `put` returned must survive a power cut.
    let store = Arc::new(LocalFileSystem::new().with_fsync(true));
    Ok(Backend { folder: Some(folder), ..backend(url, Provider::Local, prefix.as_ref(), store) })
}

/// Builds a cloud's store; an error says `besides` what it does not say itself. The builders of the crate have the same
/// methods and no trait in common.
macro_rules! built {
    ($builder:expr, $url:expr, $plain_http:expr, $chosen:expr, $besides:expr) => {{
        let mut builder = $builder.with_client_options(client($plain_http));
        for (key, value) in $chosen {
            builder = builder.with_config(key, value);
        }
        builder
            .with_url($url)
            .with_retry(no_retries())
            .with_http_connector(WatchingConnector::default())
            .build()
            .map_err(|e| StoreError::Open { dir: $url.to_owned(), source: format!("{e}{}", $besides).into() })?
    }};
}

fn s3(url: &str, prefix: &str, settings: &BTreeMap<String, String>) -> Result<Backend, StoreError> {
    let mut chosen = chosen::<AmazonS3ConfigKey>(url, "AWS_", S3_SETTINGS, settings)?;
    let mut credentials = vec!["AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned()];
    let has = |chosen: &[(AmazonS3ConfigKey, String)], key| chosen.iter().any(|(k, _)| *k == key);
    files_exist(
        url,
        &chosen,
        &[
            (AmazonS3ConfigKey::WebIdentityTokenFile, "AWS_WEB_IDENTITY_TOKEN_FILE"),
            (AmazonS3ConfigKey::ContainerAuthorizationTokenFile, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        ],
    )?;
    let refused = |reason: String| StoreError::Open { dir: url.to_owned(), source: reason.into() };
    let profile = profile::read(settings);
    credentials.push(profile.described.clone());
    let is_open = chosen.iter().any(|(key, value)| *key == AmazonS3ConfigKey::SkipSignature && value == "true");
    if !is_open
        && ![
            AmazonS3ConfigKey::AccessKeyId,
            AmazonS3ConfigKey::SecretAccessKey,
            AmazonS3ConfigKey::WebIdentityTokenFile,
        ]
        .into_iter()
        .any(|key| has(&chosen, key))
    {
        if let Some(refusal) = profile.refusal {
            return Err(refused(refusal));
        }
        // The crate would go on to the metadata service.
        let container = AmazonS3ConfigKey::ContainerCredentialsFullUri;
        if profile.credentials.is_empty()
            && has(&chosen, container)
            && !has(&chosen, AmazonS3ConfigKey::ContainerAuthorizationTokenFile)
            && !has(&chosen, AmazonS3ConfigKey::ContainerCredentialsRelativeUri)
        {
            let reason = "AWS_CONTAINER_CREDENTIALS_FULL_URI is used only with AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
            return Err(refused(reason.to_owned()));
        }
        chosen.extend(profile.credentials);
    }
    if !has(&chosen, AmazonS3ConfigKey::Region) && !has(&chosen, AmazonS3ConfigKey::DefaultRegion) {
        chosen.extend(profile.region);
    }
    if !has(&chosen, AmazonS3ConfigKey::Endpoint) && !has(&chosen, AmazonS3ConfigKey::S3Endpoint) {
        chosen.extend(profile.endpoint);
    }
    credentials.push("AWS_WEB_IDENTITY_TOKEN_FILE with AWS_ROLE_ARN".into());
    credentials.push(
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, or …_FULL_URI with AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE".into(),
    );
    credentials.push("the metadata service of the machine".into());
    let plain = is_plain_http(&chosen, &[AmazonS3ConfigKey::Endpoint, AmazonS3ConfigKey::S3Endpoint]);
    // One plain DELETE for one object, which every server of the protocol has; the bulk form they do not.
    let store = built!(AmazonS3Builder::new().with_disable_bulk_delete(true), url, plain, chosen, "");
    Ok(cloud(url, Provider::S3, prefix, Arc::new(store), credentials))
}

fn gcs(url: &str, prefix: &str, settings: &BTreeMap<String, String>) -> Result<Backend, StoreError> {
    let chosen = chosen::<GoogleConfigKey>(url, "GOOGLE_", GCS_SETTINGS, settings)?;
    let plain = is_plain_http(&chosen, &[GoogleConfigKey::BaseUrl])
        || chosen.iter().any(|(key, value)| {
            *key == GoogleConfigKey::ServiceAccountKey
                && value.contains("\"gcs_base_url\":")
                && value.contains("http://")
        });
    let file = chosen.iter().rfind(|(key, _)| *key == GoogleConfigKey::ApplicationCredentials);
    let besides = file.map_or(String::new(), |(_, file)| format!(" (GOOGLE_APPLICATION_CREDENTIALS is {file})"));
    let store = built!(GoogleCloudStorageBuilder::new(), url, plain, chosen, besides);
    let credentials = vec![
        "GOOGLE_SERVICE_ACCOUNT or GOOGLE_SERVICE_ACCOUNT_KEY".into(),
        "GOOGLE_APPLICATION_CREDENTIALS".into(),
        "the application default credentials of gcloud".into(),
        "the metadata service of the machine".into(),
    ];
    Ok(cloud(url, Provider::Gcs, prefix, Arc::new(store), credentials))
}

fn azure(url: &str, prefix: &str, settings: &BTreeMap<String, String>) -> Result<Backend, StoreError> {
    let mut chosen = chosen::<AzureConfigKey>(url, "AZURE_", AZURE_SETTINGS, settings)?;
    files_exist(url, &chosen, &[(AzureConfigKey::FederatedTokenFile, "AZURE_FEDERATED_TOKEN_FILE")])?;
    let tools = connection::read(settings);
    let tools = tools.map_err(|reason| StoreError::Open { dir: url.to_owned(), source: reason.into() })?;
    // What the crate knows and what was written for this store wins.
    chosen.splice(0..0, tools);
    let plain = is_plain_http(&chosen, &[AzureConfigKey::Endpoint])
        || chosen.iter().any(|(key, value)| *key == AzureConfigKey::UseEmulator && value == "true");
    let credentials: Vec<String> = vec![
        "AZURE_STORAGE_CONNECTION_STRING".into(),
        "AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN".into(),
        "AZURE_CLIENT_ID with AZURE_TENANT_ID and AZURE_CLIENT_SECRET or AZURE_FEDERATED_TOKEN_FILE".into(),
        "the Azure CLI, with AZURE_USE_AZURE_CLI=true".into(),
        "the metadata service of the machine".into(),
    ];
    let besides = format!("; read were {}", credentials.join("; "));
    let store = built!(MicrosoftAzureBuilder::new(), url, plain, chosen, besides);
    Ok(cloud(url, Provider::Azure, prefix, Arc::new(store), credentials))
}

fn cloud<S: ObjectStore + MultipartStore + PaginatedListStore>(
    url: &str,
    provider: Provider,
    prefix: &str,
    store: Arc<S>,
    credentials: Vec<String>,
) -> Backend {
    Backend {
        parts: Some(Parts(store.clone())),
        pages: Some(Pages(store.clone())),
        credentials,
        ..backend(url, provider, prefix, store)
    }
}

fn http(url: &str, settings: &BTreeMap<String, String>) -> Result<Backend, StoreError> {
    let chosen = chosen::<ClientConfigKey>(url, "HTTP_", &[], settings)?;
    let mut options = client(url.starts_with("http://"));
    for (key, value) in chosen {
        options = options.with_config(key, value);
    }
    let store = HttpBuilder::new()
        .with_url(url)
        .with_client_options(options)
        .with_retry(no_retries())
        .with_http_connector(WatchingConnector::default())
        .build()
        .map_err(|e| StoreError::Open { dir: url.to_owned(), source: e.into() })?;
    // The path of the URL is part of what the store was built with.
    Ok(backend(url, Provider::Http, "", Arc::new(store)))
}

/// Settings that people write, for the nearest known one in errors; the crate knows more.
const S3_SETTINGS: &[&str] = &[
    "access_key_id",
    "secret_access_key",
    "session_token",
    "region",
    "endpoint",
    "skip_signature",
    "virtual_hosted_style_request",
    "allow_http",
    "proxy_url",
    "request_payer",
    "role_arn",
    "web_identity_token_file",
];
const GCS_SETTINGS: &[&str] =
    &["service_account", "service_account_key", "application_credentials", "base_url", "skip_signature", "proxy_url"];
const AZURE_SETTINGS: &[&str] = &[
    "account_name",
    "account_key",
    "sas_token",
    "client_id",
    "client_secret",
    "tenant_id",
    "endpoint",
    "use_emulator",
    "use_azure_cli",
    "skip_signature",
    "proxy_url",
];

/// The settings that a provider knows: variables of the environment first, so that what was written for the store wins.
fn chosen<K: std::str::FromStr>(
    url: &str,
    environment_prefix: &str,
    known: &[&str],
    settings: &BTreeMap<String, String>,
) -> Result<Vec<(K, String)>, StoreError> {
    let mut chosen = Vec::new();
    let is_variable = |key: &str| !key.contains(|c: char| c.is_ascii_lowercase());
    for (key, value) in settings.iter().filter(|(key, value)| is_variable(key) && !value.is_empty()) {
        if key.starts_with(environment_prefix)
            && let Ok(known) = key.to_ascii_lowercase().parse()
        {
            chosen.push((known, value.clone()));
        }
    }
    for (key, value) in settings.iter().filter(|(key, _)| !is_variable(key)) {
        let Ok(parsed) = key.parse() else {
            return Err(StoreError::Setting {
                url: url.to_owned(),
                setting: key.clone(),
                nearest: updraft_base::nearest(key, known.iter().copied()).map(str::to_owned),
            });
        };
        chosen.push((parsed, value.clone()));
    }
    Ok(chosen)
}

/// That the files exist which credentials are read from, later and again and again.
fn files_exist<K: PartialEq>(url: &str, chosen: &[(K, String)], files: &[(K, &str)]) -> Result<(), StoreError> {
    for (key, file) in chosen {
        if let Some((_, variable)) = files.iter().find(|(of_file, _)| of_file == key) {
            std::fs::File::open(file).map_err(|e| {
                let source = format!("{variable} is {file}: {e}").into();
                StoreError::Open { dir: url.to_owned(), source }
            })?;
        }
    }
    Ok(())
}

/// Whether the store was asked for at an address without TLS; then that is what is wanted.
fn is_plain_http<K: PartialEq>(chosen: &[(K, String)], endpoints: &[K]) -> bool {
    chosen.iter().any(|(key, value)| endpoints.contains(key) && value.starts_with("http://"))
}

fn client(plain_http: bool) -> ClientOptions {
    // The deadline of a request is the retry loop's: it depends on the length of the body.
    ClientOptions::new()
        .with_allow_http(plain_http)
        .with_timeout_disabled()
        .with_connect_timeout(Duration::from_secs(5))
        .with_user_agent(object_store::HeaderValue::from_static(concat!("updraft/", env!("CARGO_PKG_VERSION"))))
}

fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn what_is_written_for_a_store_wins_over_the_environment() {
        let settings = settings(&[
            ("AWS_REGION", "eu-west-1"),
            ("AWS_PAGER", "less"),
            ("HOME", "/nowhere"),
            ("region", "us-east-2"),
        ]);
        let chosen = chosen::<AmazonS3ConfigKey>("s3://b", "AWS_", S3_SETTINGS, &settings).unwrap();
        let regions: Vec<&str> =
            chosen.iter().filter(|(k, _)| *k == AmazonS3ConfigKey::Region).map(|(_, v)| v.as_str()).collect();
        assert_eq!((chosen.len(), regions), (2, vec!["eu-west-1", "us-east-2"]));
    }

    #[test]
    fn a_setting_that_is_not_known_is_an_error_that_names_the_nearest() {
        let error = open("s3://bucket/x", &settings(&[("regoin", "x")])).unwrap_err().to_string();
        assert!(error.contains("regoin") && error.contains("region") && error.contains("s3://bucket/x"), "{error}");
    }

    #[test]
    fn urls_that_name_nothing_say_what_to_write() {
        for url in ["s3:///key", "ftp://host/x", "file://host/x", "", "gs://"] {
            let error = open(url, &BTreeMap::new()).unwrap_err().to_string();
            assert!(error.contains("write"), "{url}: {error}");
        }
    }

    #[test]
    fn a_bucket_and_its_prefix_come_apart() {
        let keys = settings(&[("access_key_id", "k"), ("secret_access_key", "s")]);
        let backend = open("s3://bucket/some/prefix/", &keys).unwrap();
        assert_eq!((backend.prefix.as_str(), backend.url.as_str()), ("some/prefix", "s3://bucket/some/prefix"));
    }
}
