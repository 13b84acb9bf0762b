//! A recipe of a transformation, as plain data: all that determines what is written.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use updraft_data::ShardFormat;
use updraft_data::ingest::Step;

/// What becomes of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformRecipe {
    /// The dataset that is read, relative to the recipe: whatever other verbs read.
    pub source: String,
    /// The folder or URL that is written to, relative to the recipe.
    pub target: String,
    /// What is selected of the table `data`, which is the source; without it, all rows as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sql: Option<String>,
    /// What is done to the selected rows, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// How shards are written.
    #[serde(default)]
    pub write: WriteSection,
}

/// How shards are written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriteSection {
    /// `mds`, `parquet`, `tfrecord` or `tar`.
    pub format: ShardFormat,
    /// The size of a shard, as the rows it is made of take in memory.
    pub shard_bytes: u64,
    /// The rows that a shard is made of, instead of a size. Where the query leaves rows out, a shard has fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_rows: Option<u64>,
    /// Whether Parquet pages or MDS shards are compressed with zstd.
    pub compress: bool,
}

impl Default for WriteSection {
    fn default() -> WriteSection {
        WriteSection { format: ShardFormat::Mds, shard_bytes: 64 << 20, shard_rows: None, compress: false }
    }
}

impl TransformRecipe {
    /// The same with all paths below `folder` where they were relative.
    ///
    /// # Errors
    /// A folder whose name is not UTF-8.
    pub fn below(mut self, folder: &Path) -> Result<TransformRecipe, String> {
        for path in [&mut self.source, &mut self.target] {
            if path.contains("://") || path.starts_with("memory:") || path.is_empty() {
                continue;
            }
            let whole = folder.join(&*path);
            *path = whole.to_str().ok_or_else(|| format!("{}: is not UTF-8", whole.display()))?.to_owned();
        }
        for step in &mut self.steps {
            if let Step::Tokenize(step) = step
                && let Some(file) = &mut step.to.file
            {
                *file = folder.join(&*file);
            }
        }
        Ok(self)
    }

    /// What is wrong beside single values: the key and the problem.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let bare = |path: &str| PathBuf::from(path.trim_end_matches('/'));
        if self.source.is_empty() {
            return Some(("source", "is empty".to_owned()));
        }
        if self.target.is_empty() {
            return Some(("target", "is empty".to_owned()));
        }
        if bare(&self.source) == bare(&self.target) {
            return Some(("target", "is the source".to_owned()));
        }
        let WriteSection { shard_bytes, shard_rows, .. } = self.write;
        if shard_bytes == 0 {
            return Some(("write.shard_bytes", "is at least 1".to_owned()));
        }
        (shard_rows == Some(0)).then(|| ("write.shard_rows", "is at least 1".to_owned()))
    }
}
