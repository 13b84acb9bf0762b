//! What requests cost, by a table of list prices with dates and sources.

use std::collections::BTreeMap;

use super::meter::{ClassReading, RequestClass};

/// The table, one row for each class of requests; a class that is not there has no known price.
const TABLE: &str = include_str!("../../prices/requests.csv");

/// List prices of one provider's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestPrices {
    /// `s3`, `gs` or `az`.
    pub provider: String,
    /// The storage class and region they hold for.
    pub holds_for: String,
    /// The day on which the source was read, `YYYY-MM-DD`.
    pub date: String,
    /// Where they were read.
    pub source: String,
    /// Millionths of a US dollar for a thousand requests.
    pub micro_usd_per_thousand: BTreeMap<RequestClass, u64>,
}

impl RequestPrices {
    /// The prices of a provider, if the table has any.
    pub fn of(provider: &str) -> Option<RequestPrices> {
        let mut prices: Option<RequestPrices> = None;
        for row in TABLE.lines().skip(1) {
            let fields: Vec<&str> = row.split(',').collect();
            let [of, class, micro_usd, holds_for, date, source] = fields[..] else { continue };
            let class = RequestClass::ALL.into_iter().find(|c| c.name() == class);
            if let (true, Some(class), Ok(micro_usd)) = (of == provider, class, micro_usd.parse()) {
                let table = prices.get_or_insert_with(|| RequestPrices {
                    provider: of.to_owned(),
                    holds_for: holds_for.to_owned(),
                    date: date.to_owned(),
                    source: source.to_owned(),
                    micro_usd_per_thousand: BTreeMap::new(),
                });
                table.micro_usd_per_thousand.insert(class, micro_usd);
            }
        }
        prices
    }

    /// The cost of these requests, rounded up; unknown where the price of one class is.
    pub(super) fn cost_micro_usd(&self, classes: &BTreeMap<RequestClass, ClassReading>) -> Option<u64> {
        let mut nano_usd: u64 = 0;
        for (class, reading) in classes {
            let price = self.micro_usd_per_thousand.get(class)?;
            nano_usd = nano_usd.checked_add(price.checked_mul(reading.requests)?)?;
        }
        Some(nano_usd.div_ceil(1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table_is_understood() {
        assert_eq!(TABLE.lines().next(), Some("provider,class,micro_usd_per_thousand,holds_for,date,source"));
        for row in TABLE.lines().skip(1) {
            let fields: Vec<&str> = row.split(',').collect();
            let prices = RequestPrices::of(fields[0]).unwrap();
            let class = RequestClass::ALL.into_iter().find(|c| c.name() == fields[1]).unwrap();
            assert_eq!(prices.micro_usd_per_thousand[&class].to_string(), fields[2], "{row}");
            assert!(prices.date.len() == 10 && !prices.source.is_empty(), "{row}");
        }
    }

    #[test]
    fn an_unknown_price_makes_the_cost_unknown_and_never_zero() {
        let prices = RequestPrices::of("s3").unwrap();
        let of = |class, requests| BTreeMap::from([(class, ClassReading { requests, ..ClassReading::default() })]);
        assert_eq!(prices.cost_micro_usd(&of(RequestClass::Get, 1_000_000)), Some(400_000));
        assert_eq!(prices.cost_micro_usd(&of(RequestClass::Put, 1)), Some(5));
        let mut partial = prices.clone();
        partial.micro_usd_per_thousand.remove(&RequestClass::Get);
        assert_eq!(partial.cost_micro_usd(&of(RequestClass::Get, 1)), None);
        assert_eq!(RequestPrices::of("http"), None);
    }
}
