//! What storage costs: a small table with date and source, or the user's own.

use serde::{Deserialize, Serialize};

/// Prices of a provider's tiers in some regions: copied from the sources that each line names.
const TABLE: &str = include_str!("../../prices/storage.csv");

/// What a tier costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierPrice {
    /// The scheme of the provider's URLs: `gs`, `s3`, `az`.
    pub provider: String,
    /// The region.
    pub region: String,
    /// The tier, as the provider writes it.
    pub tier: String,
    /// Storing.
    pub micro_usd_per_gib_month: u64,
    /// Reading.
    pub retrieval_micro_usd_per_gib: u64,
    /// Days that are paid for at least.
    pub days_min: u64,
    /// Bytes that are paid for at least for each object.
    #[serde(default)]
    pub billed_bytes_min: u64,
    /// When it was so.
    pub date: String,
    /// Who says so.
    pub source: String,
}

/// A table of prices that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the price table: {0}")]
pub struct PriceError(#[from] csv::Error);

/// Prices of one provider in one region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Prices {
    /// One for each tier.
    pub tiers: Vec<TierPrice>,
}

impl Prices {
    /// From a CSV file with the columns of [`TierPrice`]; without one, the built-in table. Without a region, the first one
    /// that the table has of the provider. Empty where it does not know the provider or the region.
    pub fn read(table: Option<&[u8]>, provider: &str, region: Option<&str>) -> Result<Prices, PriceError> {
        let mut tiers: Vec<TierPrice> = Vec::new();
        for line in csv::Reader::from_reader(table.unwrap_or(TABLE.as_bytes())).deserialize() {
            let price: TierPrice = line?;
            let is_there = match region.or(tiers.first().map(|first| first.region.as_str())) {
                Some(region) => price.region == region,
                None => true,
            };
            if price.provider == provider && is_there {
                tiers.push(price);
            }
        }
        Ok(Prices { tiers })
    }

    /// The price of a tier.
    pub fn find(&self, tier: &str) -> Option<&TierPrice> {
        self.tiers.iter().find(|price| price.tier == tier)
    }
}
