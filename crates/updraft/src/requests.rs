//! What a verb asked of remote stores, and what that costs: said at the end of every answer, because requests are billed
//! one by one and a small habit (listing, reading byte by byte) shows nowhere else before the bill.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use updraft_base::units;
use updraft_store::{MeterReading, Objects, RequestClass};

use crate::context::Answer;

/// The remote stores that were opened.
#[derive(Clone, Default)]
pub struct Requests {
    stores: Arc<Mutex<Vec<Objects>>>,
}

/// What one URL was asked, however often it was opened.
#[derive(Default)]
struct Asked {
    classes: BTreeMap<RequestClass, u64>,
    failed: u64,
    last: MeterReading,
}

impl Requests {
    /// Counts what this store is asked, unless it is on this machine.
    pub fn watch(&self, objects: &Objects) {
        let is_remote = objects.url().contains("://") && !["file", "memory"].contains(&scheme(objects.url()));
        if is_remote {
            self.stores.lock().unwrap_or_else(PoisonError::into_inner).push(objects.clone());
        }
    }

    /// Adds a line for each store to the text, and `stores` to the JSON, where there are any.
    pub fn add_to(&self, answer: &mut Answer) {
        let asked = self.asked();
        if asked.is_empty() {
            return;
        }
        for (url, asked) in &asked {
            answer.text.push_str(&asked.line(url));
        }
        if let Value::Object(json) = &mut answer.json {
            json.insert("stores".to_owned(), asked.iter().map(|(url, asked)| asked.json(url)).collect());
        }
    }

    fn asked(&self) -> BTreeMap<String, Asked> {
        let mut all: BTreeMap<String, Asked> = BTreeMap::new();
        for store in self.stores.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            all.entry(store.url().to_owned()).or_default().add(store.meter());
        }
        all
    }
}

fn scheme(url: &str) -> &str {
    url.split_once("://").map_or("", |(scheme, _)| scheme)
}

impl Asked {
    fn add(&mut self, reading: MeterReading) {
        for (class, counted) in &reading.classes {
            *self.classes.entry(*class).or_default() += counted.requests;
            self.failed += counted.failed;
        }
        let before = std::mem::replace(&mut self.last, reading);
        self.last.bytes_read += before.bytes_read;
        self.last.bytes_written += before.bytes_written;
        self.last.retries += before.retries;
        self.last.hedges += before.hedges;
        self.last.hedges_won += before.hedges_won;
        if before.prices.is_some() {
            let sum = self.last.cost_micro_usd.zip(before.cost_micro_usd);
            self.last.cost_micro_usd = sum.map(|(now, before)| now + before);
        }
    }

    fn line(&self, url: &str) -> String {
        let MeterReading { bytes_read, bytes_written, retries, hedges, cost_micro_usd, prices, .. } = &self.last;
        let requests: u64 = self.classes.values().sum();
        let classes: Vec<String> = self.classes.iter().map(|(class, n)| format!("{n} {}", class.name())).collect();
        let mut text = format!("{url}: {requests} requests ({})", classes.join(", "));
        for (count, what) in [(self.failed, "failed"), (*retries, "retried"), (*hedges, "hedged")] {
            if count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        }
        text.push_str(&format!("; {} read, {} written; ", units::bytes(*bytes_read), units::bytes(*bytes_written)));
        match (cost_micro_usd, prices) {
            (Some(cost), Some(prices)) => text.push_str(&format!(
                "{} for requests, by list prices of {} ({}), without traffic\n",
                units::usd(i128::from(*cost)),
                prices.date,
                prices.holds_for,
            )),
            _ => text.push_str("cost of requests unknown\n"),
        }
        text
    }

    fn json(&self, url: &str) -> Value {
        let MeterReading { bytes_read, bytes_written, retries, hedges, hedges_won, cost_micro_usd, prices, .. } =
            &self.last;
        let requests: BTreeMap<&str, u64> = self.classes.iter().map(|(class, n)| (class.name(), *n)).collect();
        json!({
            "url": url, "requests": requests, "failed": self.failed, "retries": retries, "hedges": hedges,
            "hedges_won": hedges_won, "bytes_read": bytes_read, "bytes_written": bytes_written,
            "cost_micro_usd": cost_micro_usd,
            "prices": prices.as_ref().map(|p| json!({ "date": p.date, "holds_for": p.holds_for, "source": p.source })),
        })
    }
}
