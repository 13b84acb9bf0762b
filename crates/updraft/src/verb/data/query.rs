//! `updraft data query`: SQL over datasets, shown or kept as a dataset.

use super::ingest::FormatArgument;
use super::parse_bytes;

/// Ask datasets in SQL; the answer is shown, or becomes a dataset
///
/// A table is a dataset of any format: `--table name=SRC` names one, and a path or URL in quotes is one by itself, as in
/// `select label, count(*) from 'data/train' group by label`. Columns that a query does not name are not read; what a
/// manifest says (numbers of rows, least and largest) is not read either. Names are case-sensitive. The SQL is that of
/// DataFusion without functions of time and chance, so the same query over the same data has the same answer, to the bit.
///
/// Needs a build with `--features query`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The query.
    #[arg(value_name = "SQL")]
    sql: String,

    /// Name a dataset.
    #[arg(long, value_name = "NAME=SRC", value_parser = parse_table)]
    table: Vec<(String, String)>,

    /// Rows to show.
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "output")]
    limit_rows: usize,

    /// Write the answer as a dataset with a manifest to this folder or URL, instead of showing it. Asked again over the
    /// same data, it is found and not made; a query that was cut off runs again, and shards that are there stay.
    #[arg(long, value_name = "DST")]
    output: Option<String>,

    /// The format of the shards.
    #[arg(long, value_enum, default_value = "parquet", requires = "output")]
    format: FormatArgument,

    /// The size of a shard, as its rows take in memory.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_bytes, requires = "output")]
    shard_size: u64,

    /// Compress Parquet pages or MDS shards with zstd.
    #[arg(long, requires = "output")]
    compress: bool,

    /// The most memory. Sorting, joining and grouping spill to temporary files where it is short.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    memory: u64,
}

fn parse_table(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, source)) if !name.is_empty() && !source.is_empty() => Ok((name.to_owned(), source.to_owned())),
        _ => Err(format!("`{text}` is not of the form NAME=PATH_OR_URL")),
    }
}

#[cfg(not(feature = "query"))]
pub(super) use engine::no_engine;
pub(crate) use engine::run;

#[cfg(not(feature = "query"))]
mod engine {
    use super::Args;
    use crate::context::{Answer, Context};
    use crate::failure::{Failure, Kind};

    pub(crate) fn run(_: &Args, _: &Context) -> Result<Answer, Failure> {
        Err(no_engine())
    }

    pub(in super::super) fn no_engine() -> Failure {
        let failure = Failure::new(Kind::Unsupported, "this build has no SQL engine");
        failure.hint("build it in: cargo install --path crates/updraft --features query")
    }
}

#[cfg(feature = "query")]
mod engine {
    use std::collections::BTreeMap;

    use serde_json::json;
    use updraft_base::units;
    use updraft_data::ingest::{IngestOptions, commit};
    use updraft_data::shards::Shards;
    use updraft_data::write::WriteOptions;
    use updraft_data::{Kind as CellKind, shard::ShardFormat};
    use updraft_query::{Query, QueryError, QueryOptions};

    use super::Args;
    use crate::context::{Answer, Context};
    use crate::failure::{Failure, Kind};
    use crate::table::table;

    pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
        let mut named: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, source) in &args.table {
            if named.insert(name, source).is_some() {
                return Err(Failure::new(Kind::Usage, format!("--table names `{name}` twice")));
            }
        }
        let known: Vec<String> = named.keys().map(|name| (*name).to_owned()).collect();
        let options = QueryOptions { threads: context.threads, memory_bytes: args.memory };
        let access = context.access();
        let query = Query::plan(&args.sql, &known, &options, |name| {
            Shards::open(named.get(name).copied().unwrap_or(name), None, args.memory / 2, &access)
        })?;
        match &args.output {
            Some(target) => keep(args, target, &query, context),
            None => show(args, &query),
        }
    }

    fn show(args: &Args, query: &Query) -> Result<Answer, Failure> {
        let answer = query.first_rows(args.limit_rows)?;
        let header: Vec<&str> = answer.columns.iter().map(|column| column.name.as_str()).collect();
        let is_number =
            |kind: &Option<CellKind>| matches!(kind, Some(CellKind::Number { shape, .. }) if shape.is_empty());
        let right: Vec<usize> = (0..header.len()).filter(|at| is_number(&answer.columns[*at].kind)).collect();
        let mut text = table(&header, &right, &answer.text());
        if answer.is_cut {
            text.push_str(&format!("… and more; --limit-rows shows more than {}\n", args.limit_rows));
        }
        let columns: Vec<_> = answer.columns.iter().map(|c| json!({ "name": c.name, "kind": c.holds })).collect();
        let json = json!({ "columns": columns, "rows": answer.json(), "is_cut": answer.is_cut });
        Ok(Answer { text, json })
    }

    fn keep(args: &Args, target: &str, query: &Query, context: &Context) -> Result<Answer, Failure> {
        let format: ShardFormat = args.format.into();
        let objects = context.objects(target)?;
        let options = IngestOptions {
            format,
            write: WriteOptions { shard_bytes: args.shard_size, compress: args.compress, ..WriteOptions::default() },
            shard_rows: None,
            columns: Vec::new(),
            shuffle: None,
            resize: BTreeMap::new(),
            threads: 1,
            memory_bytes: args.memory,
            first_unit: 0,
        };
        let ingested = query.write(&objects, &options)?;
        let version = commit(&ingested, &options, &objects)?;
        let bytes: u64 = ingested.shards.iter().map(|shard| shard.bytes).sum();
        let (count, made) = (ingested.shards.len(), ingested.made);
        let mut text = format!("{} rows in {count} shards of {format}, {}\n", ingested.rows, units::bytes(bytes));
        text.push_str(&format!("{made} made, {} found\nversion {version}\n", count as u64 - made));
        let json = json!({
            "target": target, "format": format, "rows": ingested.rows, "bytes": bytes,
            "columns": query.columns().iter().map(|c| json!({ "name": c.name, "kind": c.holds })).collect::<Vec<_>>(),
            "shards": ingested.shards.iter().map(|shard| &shard.key).collect::<Vec<_>>(), "made": made,
            "version": version,
        });
        Ok(Answer { text, json })
    }

    impl From<QueryError> for Failure {
        fn from(error: QueryError) -> Failure {
            let kind = match error {
                QueryError::Data(error) => return error.into(),
                QueryError::Sql { .. } | QueryError::UnknownColumn { .. } | QueryError::Column { .. } => Kind::Usage,
                QueryError::UnknownTable { .. } => Kind::Usage,
                QueryError::Execution { .. } | QueryError::Unit { is_store: false, .. } => Kind::Input,
                QueryError::Unit { is_store: true, .. } => Kind::Storage,
                QueryError::Cluster { .. } => {
                    return Failure::of(Kind::Storage, &error)
                        .hint("shards that are there stay; the same command goes on from there");
                }
                QueryError::Memory { .. } => {
                    return Failure::of(Kind::Limit, &error).hint("allow more with `--memory`");
                }
            };
            Failure::of(kind, &error)
        }
    }
}
