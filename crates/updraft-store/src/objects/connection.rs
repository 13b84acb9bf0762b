//! The variables that the tools of Azure read and the crate `object_store` does not: `AZURE_STORAGE_CONNECTION_STRING`, which
//! the portal shows for copying, and the names that the Azure CLI has for account and key.

use std::collections::BTreeMap;

use object_store::azure::AzureConfigKey;

const VARIABLE: &str = "AZURE_STORAGE_CONNECTION_STRING";

/// What these variables say.
///
/// # Errors
/// What is wrong with a connection string, without its secrets.
pub(super) fn read(settings: &BTreeMap<String, String>) -> Result<Vec<(AzureConfigKey, String)>, String> {
    let variable = |name: &str| settings.get(name).filter(|value| !value.is_empty());
    let mut chosen = variable(VARIABLE).map_or(Ok(Vec::new()), |text| parse(text))?;
    for (name, key) in
        [("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName), ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey)]
    {
        chosen.extend(variable(name).map(|value| (key, value.clone())));
    }
    Ok(chosen)
}

/// The parts of a connection string, `Name=value;Name=value`. Those of other services than blobs are passed over.
fn parse(text: &str) -> Result<Vec<(AzureConfigKey, String)>, String> {
    let mut parts: BTreeMap<String, &str> = BTreeMap::new();
    for (number, part) in text.split(';').map(str::trim).filter(|part| !part.is_empty()).enumerate() {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("part {} of {VARIABLE} is not `Name=value`", number + 1))?;
        parts.insert(name.trim().to_ascii_lowercase(), value.trim());
    }
    let part = |name: &str| parts.get(name).copied().filter(|value| !value.is_empty());
    if part("usedevelopmentstorage").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(vec![(AzureConfigKey::UseEmulator, "true".to_owned())]);
    }
    let endpoint = part("blobendpoint").map(|endpoint| endpoint.trim_end_matches('/').to_owned());
    // A string with a signature names the account in the address alone: `https://account.blob.core.windows.net`.
    let of_endpoint = || endpoint.as_deref()?.split_once("://")?.1.split_once(".blob.").map(|(account, _)| account);
    let account = part("accountname")
        .or_else(of_endpoint)
        .ok_or_else(|| format!("{VARIABLE} has no `AccountName=`, nor a `BlobEndpoint=` that names one"))?;
    let mut chosen = vec![(AzureConfigKey::AccountName, account.to_owned())];
    match (part("accountkey"), part("sharedaccesssignature")) {
        (Some(key), _) => chosen.push((AzureConfigKey::AccessKey, key.to_owned())),
        (None, Some(signature)) => chosen.push((AzureConfigKey::SasKey, signature.trim_start_matches('?').to_owned())),
        (None, None) => return Err(format!("{VARIABLE} has neither `AccountKey=` nor `SharedAccessSignature=`")),
    }
    let protocol = part("defaultendpointsprotocol").unwrap_or("https");
    let of_suffix = || part("endpointsuffix").map(|suffix| format!("{protocol}://{account}.blob.{suffix}"));
    chosen.extend(endpoint.clone().or_else(of_suffix).map(|endpoint| (AzureConfigKey::Endpoint, endpoint)));
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<(AzureConfigKey, String)>, String> {
        read(&BTreeMap::from([(VARIABLE.to_owned(), text.to_owned())]))
    }

    #[test]
    fn connection_strings_of_every_kind_are_understood() {
        use AzureConfigKey::{AccessKey, AccountName, Endpoint, SasKey, UseEmulator};
        for (text, expected) in [
            (
                "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=k==;EndpointSuffix=core.chinacloudapi.cn",
                vec![(AccountName, "a"), (AccessKey, "k=="), (Endpoint, "https://a.blob.core.chinacloudapi.cn")],
            ),
            (
                "BlobEndpoint=https://b.blob.core.windows.net/;QueueEndpoint=x;SharedAccessSignature=sv=1&sig=s%3D",
                vec![(AccountName, "b"), (SasKey, "sv=1&sig=s%3D"), (Endpoint, "https://b.blob.core.windows.net")],
            ),
            (
                "accountname=c; accountkey=k; blobendpoint=http://127.0.0.1:1/c;",
                vec![(AccountName, "c"), (AccessKey, "k"), (Endpoint, "http://127.0.0.1:1/c")],
            ),
            ("UseDevelopmentStorage=true", vec![(UseEmulator, "true")]),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|(key, value)| (key, value.to_owned())).collect();
            assert_eq!(of(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_connection_string_that_says_too_little_is_an_error_without_its_secrets() {
        for (text, says) in
            [("AccountKey=secret", "AccountName"), ("AccountName=a", "AccountKey"), ("AccountName=a;secret", "part 2")]
        {
            let error = of(text).unwrap_err();
            assert!(error.contains(says) && error.contains(VARIABLE) && !error.contains("secret"), "{error}");
        }
    }
}
