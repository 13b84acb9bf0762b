//! Lifecycle of a dataset's objects: which should move to another storage tier or go, by rule and by measured access; what
//! that saves; and the same rules in the words of the provider.
//!
//! A [`Plan`] is pure: objects as they were listed, what is known of their use, rules, prices and the time give actions.
//! It names every object by key, size and entity tag, and its digest is that of the actions; whoever applies a plan gives
//! the digest, so that what is done is what was shown.
//!
//! Money is in whole micro-dollars. A move must save more than it costs: what is read from a colder tier is paid for each
//! time, and what leaves it before its shortest time of storage is paid for until then. Request charges are left out. A
//! tier without a known price has no saving and is not moved to.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use updraft_base::{Digest, units};
use updraft_store::ObjectFacts;

mod live;
mod moved;
mod price;
mod provider;

pub use live::live_objects;
pub use moved::{moved_tiers, note_moved};
pub use price::{PriceError, Prices, TierPrice};
pub use provider::{Configuration, Provider, configuration};

const DAY_MS: u64 = 86_400_000;

/// Days of a month, of which prices are.
const MONTH_DAYS: u64 = 30;

/// A rules file:
///
/// ```toml
/// [[rule]]
/// name = "cold after a month"
/// prefix = "shards/"
/// idle_days = 30
/// tier = "NEARLINE"
///
/// [[rule]]
/// name = "nobody names it"
/// unreferenced = true
/// age_days = 14
/// delete = true
/// ```
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LifecycleRules {
    /// The rules; the first one that fits an object decides.
    #[serde(rename = "rule")]
    pub rules: Vec<LifecycleRule>,
    /// Versions of the dataset whose shards count as named, from the newest back.
    #[serde(default = "one")]
    pub live_versions: u32,
}

fn one() -> u32 {
    1
}

/// Which objects, and what becomes of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LifecycleRule {
    /// What it is called in plans and configurations.
    pub name: String,
    /// What keys begin with.
    #[serde(default)]
    pub prefix: String,
    /// What keys end with.
    #[serde(default)]
    pub suffix: String,
    /// Days since the object was written, at least.
    #[serde(default)]
    pub age_days: u64,
    /// Days since it was last read, at least, by the access log; since it was written or the log began, where that has no
    /// reading of it.
    #[serde(default)]
    pub idle_days: u64,
    /// Only objects that no live version of the dataset names.
    #[serde(default)]
    pub unreferenced: bool,
    /// Bytes, at least.
    #[serde(default)]
    pub bytes_min: u64,
    /// The tier that they move to.
    #[serde(default)]
    pub tier: Option<String>,
    /// Whether they are deleted.
    #[serde(default)]
    pub delete: bool,
}

impl LifecycleRules {
    /// Reads a rules file.
    ///
    /// # Errors
    /// What is wrong, with the line or the rule's name.
    pub fn parse(text: &str) -> Result<LifecycleRules, String> {
        let rules: LifecycleRules = toml::from_str(text).map_err(|e| e.to_string())?;
        let mut names = BTreeSet::new();
        for rule in &rules.rules {
            let refuse = |reason: &str| Err(format!("rule `{}`: {reason}", rule.name));
            if rule.tier.is_some() == rule.delete {
                return refuse("give it either a `tier` or `delete = true`");
            }
            if rule.unreferenced && rule.age_days == 0 {
                return refuse("give `age_days`: what is being written is named by no version yet");
            }
            if !names.insert(&rule.name) {
                return refuse("two rules have this name");
            }
        }
        Ok(rules)
    }
}

/// How often an object is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// When it was last read, in milliseconds since 1970-01-01T00:00:00Z.
    pub last_ms: u64,
    /// Readings in the 30 days before the plan.
    pub reads_of_month: u64,
}

/// Readings of objects, from a time on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// When the log begins: nobody knows what was read before.
    pub from_ms: u64,
    /// By key.
    pub accesses: BTreeMap<String, Access>,
}

impl AccessLog {
    /// Readings of a month, of an object that was read so often in the 30 days before `now_ms` that the log may know of: more
    /// where it is of fewer days.
    fn reads_of_month(&self, reads: u64, now_ms: u64) -> u64 {
        let known_days = (now_ms.saturating_sub(self.from_ms) / DAY_MS).clamp(1, MONTH_DAYS);
        (reads * MONTH_DAYS).div_ceil(known_days)
    }
}

/// What is known besides the listing.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    /// Readings; `None` where there is no log.
    pub log: Option<AccessLog>,
    /// Keys that live versions name; `None` where the dataset has no manifest.
    pub referenced: Option<BTreeSet<String>>,
    /// The tiers of objects that were moved from here before, by key.
    pub tiers: BTreeMap<String, String>,
    /// Keys that other datasets name, those in folders below and those of an `index.json` without a manifest, each with the
    /// folder.
    pub below: BTreeMap<String, String>,
}

/// The first moment of 2000: earlier readings are seconds for milliseconds.
const READ_MS_MIN: u64 = 946_684_800_000;

/// Reads an access log: CSV with the columns `key` and `read_unix_ms`, a line a reading. It begins with its first reading.
///
/// # Errors
/// The line that is not of this form, or at a time that cannot be.
pub fn read_access_log(text: &[u8], now_ms: u64) -> Result<AccessLog, String> {
    #[derive(Deserialize)]
    struct Line {
        key: String,
        read_unix_ms: u64,
    }
    let mut log = AccessLog { from_ms: now_ms, accesses: BTreeMap::new() };
    for (at, line) in csv::Reader::from_reader(text).deserialize().enumerate() {
        let Line { key, read_unix_ms } = line.map_err(|e| e.to_string())?;
        // A day for clocks that are wrong.
        if !(READ_MS_MIN..=now_ms + DAY_MS).contains(&read_unix_ms) {
            return Err(format!(
                "reading {} of `{key}`: `read_unix_ms` is {read_unix_ms}, not a time in milliseconds since 1970 from 2000 on \
                 to now",
                at + 1
            ));
        }
        log.from_ms = log.from_ms.min(read_unix_ms);
        let access = log.accesses.entry(key).or_default();
        access.last_ms = access.last_ms.max(read_unix_ms);
        access.reads_of_month += u64::from(read_unix_ms + MONTH_DAYS * DAY_MS >= now_ms);
    }
    Ok(log)
}

/// What is to be done, and what it saves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The digest of the actions.
    pub digest: Digest,
    /// Objects looked at.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The tier that they are in, those apart that were moved before.
    pub tier: String,
    /// What is to be done, by key.
    pub actions: Vec<Action>,
    /// Objects that a rule fits and that stay all the same, and why: reason, objects, bytes.
    pub left: Vec<(String, u64, u64)>,
    /// Micro-dollars saved a month; `None` where prices are not known.
    pub saved_micro_usd_month: Option<i128>,
    /// Micro-dollars that it costs once.
    pub once_micro_usd: i128,
}

/// What is to be done with one object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Action {
    /// The object.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// What the store said of its content; an object with another tag is left alone.
    pub etag: Option<String>,
    /// The rule.
    pub rule: String,
    /// Where it moves; `None` for deletion.
    pub tier: Option<String>,
    /// Micro-dollars saved a month, rounded down; `None` where the price is not known.
    pub saved_micro_usd_month: Option<i128>,
}

/// Micro-dollars times bytes, so that sums are rounded once.
const GIB: i128 = 1 << 30;

/// Makes a plan. `now_ms` is the time; `tier` the one that all objects are in that were not moved before, as listings do not
/// say it.
///
/// # Errors
/// A rule that asks for what is not known: the access log, the manifest, or a tier that the provider does not have.
pub fn plan(
    objects: &[ObjectFacts],
    usage: &Usage,
    rules: &LifecycleRules,
    provider: Provider,
    prices: &Prices,
    tier: &str,
    now_ms: u64,
) -> Result<Plan, String> {
    for rule in &rules.rules {
        if rule.idle_days > 0 && usage.log.is_none() {
            return Err(format!("rule `{}` asks for idle days; give an access log", rule.name));
        }
        if rule.unreferenced && usage.referenced.is_none() {
            return Err(format!("rule `{}` asks for unreferenced objects; there is no manifest here", rule.name));
        }
        if let Some(tier) = rule.tier.as_deref().filter(|tier| !provider.tiers().contains(tier)) {
            let known = if provider.tiers().is_empty() { "none".to_owned() } else { provider.tiers().join(", ") };
            return Err(format!("rule `{}`: {} has no tier `{tier}`; it has {known}", rule.name, provider.name()));
        }
    }
    let tier_of_others = tier;
    let mut actions = Vec::new();
    let mut left: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let (mut saved, mut once) = (0i128, 0i128);
    let mut is_priced = true;
    for object in objects.iter().filter(|object| object.key != moved::MOVED) {
        let tier = usage.tiers.get(&object.key).map_or(tier_of_others, String::as_str);
        let here = prices.find(tier);
        let age_days = now_ms.saturating_sub(object.modified_ms) / DAY_MS;
        let access = usage.log.as_ref().and_then(|log| log.accesses.get(&object.key)).copied().unwrap_or_default();
        // What nobody wrote down was not measured: an object may have been read until the log began.
        let known_ms = usage.log.as_ref().map_or(0, |log| log.from_ms);
        let idle_days = now_ms.saturating_sub(access.last_ms.max(object.modified_ms).max(known_ms)) / DAY_MS;
        let reads_of_month = usage.log.as_ref().map_or(0, |log| log.reads_of_month(access.reads_of_month, now_ms));
        let folder = usage.below.get(&object.key);
        let is_referenced =
            folder.is_some() || usage.referenced.as_ref().is_some_and(|keys| keys.contains(&object.key));
        let matches = |rule: &LifecycleRule| {
            object.key.starts_with(&rule.prefix)
                && object.key.ends_with(&rule.suffix)
                && age_days >= rule.age_days
                && (rule.idle_days == 0 || idle_days >= rule.idle_days)
                && object.bytes >= rule.bytes_min
        };
        let mut stays = |reason: String| {
            let sums = left.entry(reason).or_default();
            *sums = (sums.0 + 1, sums.1 + object.bytes);
        };
        let named = |folder: &str| match folder {
            "" => "`index.json` names it".to_owned(),
            folder => format!("the dataset in `{folder}` names it"),
        };
        let fits = |rule: &&LifecycleRule| matches(rule) && !(rule.unreferenced && is_referenced);
        let Some(rule) = rules.rules.iter().find(fits) else {
            if let Some(folder) = folder.filter(|_| rules.rules.iter().any(matches)) {
                stays(named(folder));
            }
            continue;
        };
        // What a live version needs is not deleted by its age.
        if rule.delete && is_referenced {
            stays(match folder {
                Some(folder) => named(folder),
                None => format!("`{}` would delete what a live version names", rule.name),
            });
            continue;
        }
        if rule.tier.as_deref() == Some(tier) {
            stays(format!("already in {tier}"));
            continue;
        }
        if let Some(target) = rule.tier.as_deref().filter(|t| is_referenced && provider.is_offline(t)) {
            stays(format!("a live version names it, and what is in {target} cannot be read until it is restored"));
            continue;
        }
        let bytes = i128::from(object.bytes);
        let billed = |price: &TierPrice| i128::from(object.bytes.max(price.billed_bytes_min));
        let saves = match &rule.tier {
            None => here.map(|here| billed(here) * i128::from(here.micro_usd_per_gib_month)),
            Some(target) => match (here, prices.find(target)) {
                (Some(here), Some(there)) => {
                    let reads = i128::from(reads_of_month);
                    let month = billed(here) * i128::from(here.micro_usd_per_gib_month)
                        - billed(there) * i128::from(there.micro_usd_per_gib_month)
                        - reads * bytes * i128::from(there.retrieval_micro_usd_per_gib);
                    if month <= 0 && reads == 0 && object.bytes < there.billed_bytes_min {
                        let least = units::bytes(there.billed_bytes_min);
                        stays(format!("{target} is paid for at least {least}, which would cost more"));
                        continue;
                    }
                    if month <= 0 {
                        stays(format!("read {reads} times a month, {target} would cost more"));
                        continue;
                    }
                    if let Some(reason) = leaves_too_soon(object, rule, rules, here, there, age_days) {
                        stays(reason);
                        continue;
                    }
                    Some(month)
                }
                _ => {
                    stays(format!("the price of {tier} or {target} is not known"));
                    continue;
                }
            },
        };
        if let Some(here) = here {
            let rest_days = here.days_min.saturating_sub(age_days);
            let early = billed(here) * i128::from(here.micro_usd_per_gib_month) * i128::from(rest_days)
                / i128::from(MONTH_DAYS);
            let retrieved = if rule.tier.is_some() { bytes * i128::from(here.retrieval_micro_usd_per_gib) } else { 0 };
            once += early + retrieved;
        }
        is_priced &= saves.is_some();
        saved += saves.unwrap_or(0);
        actions.push(Action {
            key: object.key.clone(),
            bytes: object.bytes,
            etag: object.etag.clone(),
            rule: rule.name.clone(),
            tier: rule.tier.clone(),
            saved_micro_usd_month: saves.map(|s| s / GIB),
        });
    }
    actions.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(Plan {
        digest: digest_of(&actions),
        objects: objects.len() as u64,
        bytes: objects.iter().map(|o| o.bytes).sum(),
        tier: tier.to_owned(),
        actions,
        left: left.into_iter().map(|(reason, (objects, bytes))| (reason, objects, bytes)).collect(),
        saved_micro_usd_month: is_priced.then_some(saved / GIB),
        once_micro_usd: once / GIB,
    })
}

/// Why a colder tier does not pay: a later rule deletes the object before its shortest time there is over.
fn leaves_too_soon(
    object: &ObjectFacts,
    moves: &LifecycleRule,
    rules: &LifecycleRules,
    here: &TierPrice,
    there: &TierPrice,
    age_days: u64,
) -> Option<String> {
    let deletes = |rule: &&LifecycleRule| {
        rule.delete
            && !rule.unreferenced
            && rule.idle_days == 0
            && object.key.starts_with(&rule.prefix)
            && object.key.ends_with(&rule.suffix)
            && object.bytes >= rule.bytes_min
    };
    let left_days = rules.rules.iter().filter(deletes).map(|r| r.age_days.saturating_sub(age_days)).min()?;
    let stay = u128::from(here.micro_usd_per_gib_month) * u128::from(left_days);
    let go = u128::from(there.micro_usd_per_gib_month) * u128::from(left_days.max(there.days_min));
    (go >= stay).then(|| {
        let tier = moves.tier.as_deref().unwrap_or("there");
        format!("is deleted in {left_days} days, {tier} is paid for at least {}", there.days_min)
    })
}

fn digest_of(actions: &[Action]) -> Digest {
    let mut hasher = updraft_base::Hasher::new();
    for action in actions {
        let etag = action.etag.as_deref().unwrap_or("");
        let tier = action.tier.as_deref().unwrap_or("");
        for field in [&action.key, etag, &action.rule, tier, &action.bytes.to_string()] {
            hasher.field(field.as_bytes());
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests;
