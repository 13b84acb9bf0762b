//! Credentials that the tools of AWS keep in a user's home: `~/.aws/credentials` and `~/.aws/config`.
//!
//! The crate `object_store` does not read them, and they are where most people have theirs. Only keys and the region are
//! read; a profile that asks for single sign-on, a role or a program is said to be one, and not used.

use std::collections::BTreeMap;
use std::path::PathBuf;

use object_store::aws::AmazonS3ConfigKey;

/// What a profile says, and how messages name it.
#[derive(Debug, Default)]
pub(super) struct Profile {
    pub(super) credentials: Vec<(AmazonS3ConfigKey, String)>,
    pub(super) region: Option<(AmazonS3ConfigKey, String)>,
    pub(super) described: String,
}

/// The profile that the environment in `settings` selects.
pub(super) fn read(settings: &BTreeMap<String, String>) -> Profile {
    let name = settings.get("AWS_PROFILE").map_or("default", String::as_str);
    let home = settings.get("HOME").or_else(|| settings.get("USERPROFILE"));
    let file = |variable: &str, below_home: &str| {
        settings.get(variable).map(PathBuf::from).or_else(|| home.map(|home| PathBuf::from(home).join(below_home)))
    };
    let credentials_file = file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
    let config_file = file("AWS_CONFIG_FILE", ".aws/config");
    let text = |path: &Option<PathBuf>| path.as_ref().and_then(|p| std::fs::read_to_string(p).ok()).unwrap_or_default();
    let config_section = if name == "default" { name.to_owned() } else { format!("profile {name}") };
    // The credentials file comes last, so that it wins.
    let mut values = section(&text(&config_file), &config_section);
    values.extend(section(&text(&credentials_file), name));
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
        ["sso_session", "sso_start_url", "role_arn", "credential_process"].iter().find(|k| values.contains_key(**k));
    let described = match (indirect, credentials.is_empty(), &credentials_file) {
        (Some(key), true, _) => format!(
            "profile `{name}`, which uses {key}; run `aws configure export-credentials --profile {name} --format env` and set \
             what it prints"
        ),
        (_, true, Some(file)) => format!("profile `{name}` in {}, which has no keys", file.display()),
        (_, true, None) => format!("profile `{name}`, but HOME is not set"),
        (_, false, _) => format!("profile `{name}`"),
    };
    Profile { credentials, region: take(AmazonS3ConfigKey::Region, "region"), described }
}

/// The values of one section of an INI file.
fn section(text: &str, name: &str) -> BTreeMap<String, String> {
    let mut inside = false;
    let mut values = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = header.split_whitespace().eq(name.split_whitespace());
        } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
            values.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(sso.credentials.is_empty() && sso.described.contains("export-credentials"), "{}", sso.described);
    }
}
