//! What was ingested becomes a version: a dataset of its own, or more rows of one that is there.

use updraft_base::Digest;
use updraft_store::{Objects, ReadObjects};

use crate::error::DataError;
use crate::manifest::{LATEST, Manifest, Version};
use crate::source::shard::ShardFormat;
use crate::write::mds_index;

use super::{IngestOptions, Ingested, Input, columns_of};

/// Makes the shards a version of the dataset. The same shards once more, or by several at once, are the same version.
/// MDS gets the index that MosaicML Streaming reads, too.
pub fn commit(ingested: &Ingested, options: &IngestOptions, target: &Objects) -> Result<Digest, DataError> {
    let manifest = manifest(ingested);
    let version = match manifest.commit(target) {
        // Whoever came first committed these shards, or others, which these then replace.
        Err(DataError::Raced { .. }) => manifest.commit(target),
        done => done,
    }?;
    if options.format == ShardFormat::Mds {
        put_index(options, target)?;
    }
    Ok(version)
}

/// Checks that nothing of others is replaced in a folder: the index of MosaicML Streaming, where no manifest is beside it.
///
/// # Errors
/// The index that would be.
pub fn check_target(target: &Objects) -> Result<(), DataError> {
    match target.head(INDEX) {
        Ok(_) if Manifest::latest(target)?.is_none() => {
            let reason = "lists shards that were not ingested here; choose another folder";
            Err(DataError::file(ReadObjects::name(target, INDEX).as_ref(), reason))
        }
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Where MosaicML Streaming looks for the shards of a folder.
const INDEX: &str = "index.json";

fn manifest(ingested: &Ingested) -> Manifest {
    let inputs = ingested.inputs.clone();
    Manifest { inputs, ..Manifest::new(ingested.schema.clone(), ingested.shards.clone()) }
}

/// The inputs of which the dataset holds nothing yet; all of them where there is no dataset.
///
/// # Errors
/// A dataset whose shards or columns are not those that would be written.
pub fn not_yet_in(target: &Objects, inputs: Vec<Input>, options: &IngestOptions) -> Result<Vec<Input>, DataError> {
    let Some(version) = Manifest::load(target, None)? else { return Ok(inputs) };
    let columns = columns_of(&inputs, options)?;
    if let Some(difference) = version.manifest.schema.difference(&columns) {
        let reason = format!("{difference} as in the version {} that is to be appended to", version.digest);
        return Err(DataError::file(ReadObjects::name(target, LATEST).as_ref(), reason));
    }
    let packed = |key: &str| key.ends_with(".zstd");
    let is_packed = options.format == ShardFormat::Mds && options.write.compress;
    if let Some(other) = version.manifest.shards.iter().find(|shard| {
        shard.format != options.format || (shard.format == ShardFormat::Mds && packed(&shard.key) != is_packed)
    }) {
        let form = |format: ShardFormat, is_packed| format!("{}{format}", if is_packed { "compressed " } else { "" });
        let (there, here) = (form(other.format, packed(&other.key)), form(options.format, is_packed));
        let name = ReadObjects::name(target, &other.key);
        return Err(DataError::file(name.as_ref(), format!("is {there}, and what is to be appended would be {here}")));
    }
    Ok(inputs.into_iter().filter(|input| !version.manifest.inputs.contains(&input.identity)).collect())
}

/// Puts the shards behind those of the dataset's newest version, whoever else appends meanwhile; where there is none, they
/// are the first. Shards that it has already are not added again.
///
/// # Errors
/// Columns other than the dataset's.
pub fn append(ingested: &Ingested, options: &IngestOptions, target: &Objects) -> Result<Digest, DataError> {
    let first = manifest(ingested);
    let version = match Manifest::latest(target)? {
        Some(latest) => Manifest { parent: Some(latest), appends: true, ..first }.commit(target)?,
        None => match first.commit(target) {
            Err(DataError::Raced { .. }) => return append(ingested, options, target),
            done => done?,
        },
    };
    if options.format == ShardFormat::Mds {
        put_index(options, target)?;
    }
    Ok(version)
}

/// The index of the newest version. Where somebody commits in between, the index that was put last may be the older one,
/// and is put again.
fn put_index(options: &IngestOptions, target: &Objects) -> Result<(), DataError> {
    let mut stands_at = None;
    while let Some(Version { digest, manifest, .. }) = Manifest::load(target, None)?
        && stands_at != Some(digest)
    {
        target.put(INDEX, mds_index(&manifest.schema, &manifest.shards, &options.write)?)?;
        stands_at = Some(digest);
    }
    Ok(())
}
