//! Credentials that the tools of AWS keep in a user's home: `~/.aws/credentials` and `~/.aws/config`.
//!
//! The crate `object_store` does not read them, and they are where most people have theirs. Only keys, region and endpoint
//! are read. A profile that asks for single sign-on, a role or a program is refused: what comes next in the chain, such as
//! the role of the machine, may do something else than what was asked for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use object_store::aws::AmazonS3ConfigKey;

/// What a profile says, and how messages name it.
#[derive(Debug, Default)]
pub(super) struct Profile {
    pub(super) credentials: Vec<(AmazonS3ConfigKey, String)>,
    pub(super) region: Option<(AmazonS3ConfigKey, String)>,
    pub(super) endpoint: Option<(AmazonS3ConfigKey, String)>,
    pub(super) described: String,
    /// Why the credentials it means are not known: nobody else's may be used instead.
    pub(super) refusal: Option<String>,
}

/// Where a profile says that its credentials come from elsewhere, and whether that goes before keys beside it.
const INDIRECT: [(&str, bool); 4] =
    [("role_arn", true), ("sso_session", true), ("sso_start_url", true), ("credential_process", false)];

/// The profile that the environment in `settings` selects.
pub(super) fn read(settings: &BTreeMap<String, String>) -> Profile {
    let variable = |name: &str| settings.get(name).filter(|value| !value.is_empty());
    let chosen = variable("AWS_PROFILE");
    let name = chosen.map_or("default", String::as_str);
    let home = variable("HOME").or_else(|| variable("USERPROFILE"));
    let file = |of: &str, below_home: &str| {
        variable(of).map(PathBuf::from).or_else(|| home.map(|home| PathBuf::from(home).join(below_home)))
    };
    let credentials_file = file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
    let config_file = file("AWS_CONFIG_FILE", ".aws/config");
    let text = |path: &Option<PathBuf>| path.as_ref().and_then(|p| std::fs::read_to_string(p).ok()).unwrap_or_default();
    let config_section = if name == "default" { name.to_owned() } else { format!("profile {name}") };
    let sections = [section(&text(&config_file), &config_section), section(&text(&credentials_file), name)];
    let exists = sections.iter().any(Option::is_some);
    // The credentials file comes last, so that it wins.
    let values: BTreeMap<String, String> = sections.into_iter().flatten().flatten().collect();
    let take = |key: AmazonS3ConfigKey, name: &str| values.get(name).map(|value| (key, value.clone()));
    let mut credentials = Vec::new();
    if let (Some(id), Some(secret)) = (
        take(AmazonS3ConfigKey::AccessKeyId, "aws_access_key_id"),
        take(AmazonS3ConfigKey::SecretAccessKey, "aws_secret_access_key"),
    ) {
        credentials.extend([id, secret]);
        credentials.extend(take(AmazonS3ConfigKey::Token, "aws_session_token"));
    }
    let indirect =
        INDIRECT.iter().find(|(key, is_first)| values.contains_key(*key) && (*is_first || credentials.is_empty()));
    let shown = |path: &Option<PathBuf>| path.as_ref().map_or("~".into(), |path| path.display().to_string());
    let refusal = match (indirect, chosen) {
        (Some((key, _)), _) => Some(format!(
            "its profile `{name}` uses {key}; run `aws configure export-credentials --profile {name} --format env` and set \
             what it prints"
        )),
        (None, Some(name)) if !exists => Some(format!(
            "AWS_PROFILE is `{name}`, which is neither in {} nor in {}",
            shown(&credentials_file),
            shown(&config_file)
        )),
        (None, Some(name)) if credentials.is_empty() => {
            Some(format!("AWS_PROFILE is `{name}`, which has no keys in {}", shown(&credentials_file)))
        }
        _ => None,
    };
    let described = match (credentials.is_empty(), &credentials_file) {
        (true, Some(file)) => format!("profile `{name}` in {}, which has no keys", file.display()),
        (true, None) => format!("profile `{name}`, but HOME is not set"),
        (false, _) => format!("profile `{name}`"),
    };
    Profile {
        credentials,
        region: take(AmazonS3ConfigKey::Region, "region"),
        endpoint: take(AmazonS3ConfigKey::Endpoint, "endpoint_url"),
        described,
        refusal,
    }
}

/// The values of one section of an INI file, if there is one. Indented lines belong to the value before them.
fn section(text: &str, name: &str) -> Option<BTreeMap<String, String>> {
    let mut inside = false;
    let mut values = None;
    for line in text.lines().map(str::trim_end).filter(|line| !line.trim_start().starts_with(['#', ';'])) {
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = header.replace('"', "").split_whitespace().eq(name.split_whitespace());
            if inside {
                values.get_or_insert_with(BTreeMap::new);
            }
        } else if let (true, Some((key, value)), Some(values)) = (inside, line.split_once('='), &mut values)
            && !line.starts_with([' ', '\t'])
        {
            values.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_that_is_missing_or_means_others_is_never_passed_over() {
        let home = tempfile::tempdir().unwrap();
        let (keys, config) = (home.path().join("keys"), home.path().join("config"));
        std::fs::write(&keys, "[both]\naws_access_key_id=A\naws_secret_access_key=B\n").unwrap();
        std::fs::write(
            &config,
            "[profile both]\nrole_arn = r\n[profile \"my sso\"]\nsso_session = x\n[profile run]\ncredential_process = p\n\
             [profile none]\ns3 =\n  region = nested\nendpoint_url = http://here:1\n",
        )
        .unwrap();
        let with = |profile: &str| {
            read(&BTreeMap::from([
                ("AWS_SHARED_CREDENTIALS_FILE".to_owned(), keys.display().to_string()),
                ("AWS_CONFIG_FILE".to_owned(), config.display().to_string()),
                ("AWS_PROFILE".to_owned(), profile.to_owned()),
            ]))
        };
        for (profile, says) in [
            ("absent", "neither in"),
            ("both", "role_arn"),
            ("my sso", "sso_session"),
            ("run", "credential_process"),
            ("none", "has no keys"),
        ] {
            let refusal = with(profile).refusal.unwrap();
            assert!(refusal.contains(says) && refusal.contains(profile), "{refusal}");
        }
        // Nobody chose the default.
        assert_eq!(with("").refusal, None);
        assert_eq!((with("none").region, with("none").endpoint.unwrap().1), (None, "http://here:1".to_owned()));
    }

    #[test]
    fn the_selected_profile_gives_keys_and_region() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(
            home.path().join(".aws/credentials"),
            "[default]\naws_access_key_id = A\naws_secret_access_key = B\n[work]\n# a note\naws_access_key_id=C\naws_secret_access_key=D=\n",
        )
        .unwrap();
        std::fs::write(
            home.path().join(".aws/config"),
            "[profile work]\nregion = eu-north-1\n[profile sso]\nsso_session = x\n",
        )
        .unwrap();
        let with = |profile: Option<&str>| {
            let mut settings = BTreeMap::from([("HOME".to_owned(), home.path().display().to_string())]);
            settings.extend(profile.map(|p| ("AWS_PROFILE".to_owned(), p.to_owned())));
            read(&settings)
        };
        assert_eq!(with(None).credentials[0].1, "A");
        let work = with(Some("work"));
        assert_eq!(work.credentials.iter().map(|c| c.1.as_str()).collect::<Vec<_>>(), ["C", "D="]);
        assert_eq!(work.region.unwrap().1, "eu-north-1");
        let sso = with(Some("sso"));
        assert!(sso.credentials.is_empty() && sso.refusal.unwrap().contains("export-credentials"));
    }
}
