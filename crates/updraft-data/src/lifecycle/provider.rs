//! The same rules in the words of the provider, who then applies them without us: S3 and GCS lifecycle configurations and
//! Azure management policies. What a provider has no words for is named, not left out in silence.

use serde::Serialize;
use serde_json::{Value, json};

use super::{LifecycleRule, LifecycleRules, Usage};

/// Whose storage it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// Amazon S3.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
    /// A folder, or what else has no tiers.
    Local,
}

impl Provider {
    /// By the scheme of a URL.
    pub fn of_url(url: &str) -> Provider {
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("s3" | "s3a") => Provider::S3,
            Some("gs") => Provider::Gcs,
            Some("az" | "abfs" | "abfss" | "azure" | "adl") => Provider::Azure,
            _ => Provider::Local,
        }
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Provider::S3 => "Amazon S3",
            Provider::Gcs => "Google Cloud Storage",
            Provider::Azure => "Azure Blob Storage",
            Provider::Local => "a folder",
        }
    }

    /// Its name in price tables: the scheme of its URLs.
    pub fn scheme(self) -> &'static str {
        match self {
            Provider::S3 => "s3",
            Provider::Gcs => "gs",
            Provider::Azure => "az",
            Provider::Local => "file",
        }
    }

    /// Its tiers, warmest first, as it writes them.
    pub fn tiers(self) -> &'static [&'static str] {
        match self {
            Provider::S3 => &["STANDARD", "STANDARD_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE"],
            Provider::Gcs => &["STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE"],
            Provider::Azure => &["Hot", "Cool", "Cold", "Archive"],
            Provider::Local => &[],
        }
    }

    /// Whether objects in this tier cannot be read until they are restored.
    pub fn is_offline(self, tier: &str) -> bool {
        match self {
            Provider::S3 => matches!(tier, "GLACIER" | "DEEP_ARCHIVE"),
            Provider::Azure => tier == "Archive",
            Provider::Gcs | Provider::Local => false,
        }
    }
}

/// A provider's configuration, and what it could not say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Configuration {
    /// What the provider's tools take.
    pub json: Value,
    /// Rules that are not in it, and why.
    pub left_out: Vec<(String, String)>,
}

/// The rules for all below a URL. `None` for what has no lifecycle of its own.
///
/// A provider knows no manifest and no order of rules: it applies all that fit, deletes rather than moves, and moves to the
/// colder of two tiers. A rule that would so do what the plan does not is left out.
pub fn configuration(rules: &LifecycleRules, provider: Provider, url: &str, usage: &Usage) -> Option<Configuration> {
    if provider == Provider::Local {
        return None;
    }
    let below = url.split_once("://").map_or("", |(_, rest)| rest).trim_end_matches('/');
    let (bucket, folder) = below.split_once('/').unwrap_or((below, ""));
    let prefix = |rule: &LifecycleRule| match folder {
        "" => rule.prefix.clone(),
        folder => format!("{folder}/{}", rule.prefix),
    };
    let mut left_out = Vec::new();
    let mut said = Vec::new();
    let mut earlier: Vec<(&LifecycleRule, bool)> = Vec::new();
    for rule in &rules.rules {
        let reason = unsaid(rule, provider)
            .or_else(|| harms_live(rule, provider, usage))
            .map(str::to_owned)
            .or_else(|| breaks_order(rule, &earlier, provider));
        earlier.push((rule, reason.is_none()));
        match reason {
            Some(reason) => left_out.push((rule.name.clone(), reason)),
            None => said.push(match provider {
                Provider::S3 => s3(rule, &prefix(rule)),
                Provider::Gcs => gcs(rule, &prefix(rule)),
                _ => azure(rule, &format!("{bucket}/{}", prefix(rule))),
            }),
        }
    }
    let json = match provider {
        Provider::S3 => json!({ "Rules": said }),
        Provider::Gcs => json!({ "lifecycle": { "rule": said } }),
        _ => json!({ "rules": said }),
    };
    Some(Configuration { json, left_out })
}

/// What of a rule the provider has no words for.
fn unsaid(rule: &LifecycleRule, provider: Provider) -> Option<&'static str> {
    let tier = rule.tier.as_deref();
    match provider {
        _ if rule.unreferenced => Some("it does not know which objects a version names"),
        Provider::S3 | Provider::Gcs if rule.idle_days > 0 => Some("it has no rule by last access"),
        Provider::S3 | Provider::Azure if !rule.suffix.is_empty() => Some("it has no rule by the end of names"),
        Provider::Gcs | Provider::Azure if rule.bytes_min > 0 => Some("it has no rule by size"),
        // What is idle for as long is as old, so a shorter age says nothing.
        Provider::Azure if rule.idle_days > 0 && rule.age_days > rule.idle_days => {
            Some("it has no rule by age and last access together")
        }
        // https://docs.aws.amazon.com/AmazonS3/latest/userguide/lifecycle-transition-general-considerations.html
        Provider::S3 if matches!(tier, Some("STANDARD_IA" | "ONEZONE_IA")) && rule.age_days < 30 => {
            Some("its documentation refuses objects of less than 30 days there; give `age_days = 30` or more")
        }
        Provider::S3 | Provider::Gcs if tier.is_some() && tier == provider.tiers().first().copied() => {
            Some("it moves nothing to its warmest tier")
        }
        _ => None,
    }
}

/// Whether the plan holds back what the provider would do to objects that live versions name, now or later.
fn harms_live(rule: &LifecycleRule, provider: Provider, usage: &Usage) -> Option<&'static str> {
    let is_offline = rule.tier.as_deref().is_some_and(|tier| provider.is_offline(tier));
    if !rule.delete && !is_offline {
        return None;
    }
    let mut live = usage.referenced.iter().flatten().chain(usage.below.keys());
    live.any(|key| fits_kin(rule, key)).then_some(if rule.delete {
        "it would delete what a live version names"
    } else {
        "it would put what a live version names where it cannot be read until it is restored"
    })
}

/// Whether a rule can fit the object or one that a later version may name: of the same name up to the first digit or the
/// last separator, and of the same extension.
fn fits_kin(rule: &LifecycleRule, key: &str) -> bool {
    let digit = key.find(|c: char| c.is_ascii_digit());
    let separator = key.rfind(['/', '-', '_']).map(|at| at + 1);
    let stem = &key[..digit.into_iter().chain(separator).min().unwrap_or(key.len())];
    let extension = &key[key.rfind(['.', '/']).unwrap_or(0)..];
    is_start_of_other(&rule.prefix, stem) && (rule.suffix.ends_with(extension) || extension.ends_with(&rule.suffix))
}

/// Why the provider, which applies all rules that fit, would do something else than the first that fits.
fn breaks_order(rule: &LifecycleRule, earlier: &[(&LifecycleRule, bool)], provider: Provider) -> Option<String> {
    let coldness = |rule: &LifecycleRule| match rule.tier.as_deref() {
        Some(tier) => provider.tiers().iter().position(|t| *t == tier).unwrap_or(0),
        None => usize::MAX,
    };
    let fit_the_same = |other: &LifecycleRule| {
        is_start_of_other(&rule.prefix, &other.prefix)
            && (rule.suffix.ends_with(&other.suffix) || other.suffix.ends_with(&rule.suffix))
    };
    // What an earlier rule deletes may as well move first.
    let differs = |(other, is_said): &&(&LifecycleRule, bool)| {
        !other.delete
            && other.tier != rule.tier
            && fit_the_same(other)
            && (!*is_said || coldness(other) < coldness(rule))
    };
    let (first, _) = earlier.iter().find(differs)?;
    Some(format!("`{}` comes first and fits the same objects, and it does not go by the order of rules", first.name))
}

fn is_start_of_other(a: &str, b: &str) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

/// <https://docs.aws.amazon.com/AmazonS3/latest/API/API_LifecycleRule.html>
fn s3(rule: &LifecycleRule, prefix: &str) -> Value {
    let filter = match rule.bytes_min {
        0 => json!({ "Prefix": prefix }),
        // Larger than, where ours is at least.
        bytes => json!({ "And": { "Prefix": prefix, "ObjectSizeGreaterThan": bytes - 1 } }),
    };
    let mut said = json!({ "ID": rule.name, "Status": "Enabled", "Filter": filter });
    // Whole days, at least one.
    let days = rule.age_days.max(1);
    match &rule.tier {
        Some(tier) => said["Transitions"] = json!([{ "Days": days, "StorageClass": tier }]),
        None => said["Expiration"] = json!({ "Days": days }),
    }
    said
}

/// <https://cloud.google.com/storage/docs/json_api/v1/buckets#lifecycle>
fn gcs(rule: &LifecycleRule, prefix: &str) -> Value {
    let action = match &rule.tier {
        Some(tier) => json!({ "type": "SetStorageClass", "storageClass": tier }),
        None => json!({ "type": "Delete" }),
    };
    let mut condition = json!({ "age": rule.age_days });
    if !prefix.is_empty() {
        condition["matchesPrefix"] = json!([prefix]);
    }
    if !rule.suffix.is_empty() {
        condition["matchesSuffix"] = json!([rule.suffix]);
    }
    json!({ "action": action, "condition": condition })
}

/// <https://learn.microsoft.com/azure/storage/blobs/lifecycle-management-policy-structure>
fn azure(rule: &LifecycleRule, prefix: &str) -> Value {
    let condition = match rule.idle_days {
        0 => json!({ "daysAfterModificationGreaterThan": rule.age_days }),
        days => json!({ "daysAfterLastAccessTimeGreaterThan": days }),
    };
    let action = match rule.tier.as_deref() {
        Some("Cool") => "tierToCool",
        Some("Cold") => "tierToCold",
        Some("Archive") => "tierToArchive",
        Some(_) => "tierToHot",
        None => "delete",
    };
    // Names there are letters and digits.
    let name: String = rule.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    json!({
        "enabled": true, "name": name, "type": "Lifecycle",
        "definition": {
            "filters": { "blobTypes": ["blockBlob"], "prefixMatch": [prefix] },
            "actions": { "baseBlob": { action: condition } },
        },
    })
}
