//! The same rules in the words of the provider, who then applies them without us: S3 and GCS lifecycle configurations and
//! Azure management policies. What a provider has no words for is named, not left out in silence.

use serde::Serialize;
use serde_json::{Value, json};

use super::{LifecycleRule, LifecycleRules};

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
    /// Rules that have no words there, and why.
    pub left_out: Vec<(String, &'static str)>,
}

/// The rules for all below a URL. `None` for what has no lifecycle of its own.
pub fn configuration(rules: &LifecycleRules, provider: Provider, url: &str) -> Option<Configuration> {
    let below = url.split_once("://").map_or("", |(_, rest)| rest).trim_end_matches('/');
    let (bucket, folder) = below.split_once('/').unwrap_or((below, ""));
    let prefix = |rule: &LifecycleRule| match folder {
        "" => rule.prefix.clone(),
        folder => format!("{folder}/{}", rule.prefix),
    };
    let mut left_out = Vec::new();
    let mut said = Vec::new();
    for rule in &rules.rules {
        let unsaid = match provider {
            Provider::Local => return None,
            _ if rule.unreferenced => Some("it does not know which objects a version names"),
            Provider::S3 | Provider::Gcs if rule.idle_days > 0 => Some("it has no rule by last access"),
            Provider::S3 | Provider::Azure if !rule.suffix.is_empty() => Some("it has no rule by the end of names"),
            Provider::Gcs | Provider::Azure if rule.bytes_min > 0 => Some("it has no rule by size"),
            _ => None,
        };
        match unsaid {
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
