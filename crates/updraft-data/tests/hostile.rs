//! Damaged and hostile files: an error or a result, never a panic and never all memory there is.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use proptest::prelude::*;
use updraft_data::{DataError, Dataset, DatasetConfig, Loader, LoaderOptions, read_npy, read_npz};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

fn read_all(path: &Path, recipe: &str) -> Result<(), DataError> {
    let config: DatasetConfig =
        toml::from_str(&format!("path = {path:?}\nmemory_bytes = 1_000_000\n{recipe}")).unwrap();
    let dataset = Dataset::open(&config, Path::new("/"))?;
    // Few enough batches for a file that came to claim billions of rows.
    let options = LoaderOptions { batch_size: 4, threads: 0, ..LoaderOptions::default() };
    let loader = Loader::new(dataset.into(), options)?;
    loader.batches(0..loader.steps_per_epoch().min(8))?.try_for_each(|batch| batch.map(|_| ()))
}

const PLAIN: &str = "[[tensors]]\nname = \"int32\"\n[[tensors]]\nname = \"float64\"\n[[tensors]]\nname = \"list\"\n\
     [[tensors]]\nname = \"text\"\ntransform = [{ index_of = [\"t0\", \"t1\", \"t2\", \"t3\", \"t4\", \"t5\", \"t6\"] }]\n\
     [[tensors]]\nname = \"picture.bytes\"\ntransform = [{ decode = \"rgb\" }]\n";

/// Reads damaged versions of a file and expects every error to name it.
fn check(name: &str, read: impl Fn(&Path) -> Result<(), DataError>, damage: impl Iterator<Item = Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    let mut errors = 0;
    for (index, bytes) in damage.enumerate() {
        std::fs::write(&path, &bytes).unwrap();
        match catch_unwind(AssertUnwindSafe(|| read(&path))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                errors += 1;
                let text = error.to_string();
                assert!(text.contains(name) || text.starts_with("tensor `"), "damage {index}: `{text}`");
            }
            Err(_) => panic!("damage {index} of {name} panicked"),
        }
    }
    assert!(errors > 0, "no damage was noticed");
}

/// The file cut off everywhere, and with each byte changed in three ways.
fn everywhere(bytes: Vec<u8>) -> impl Iterator<Item = Vec<u8>> {
    let cut = bytes.clone();
    let cuts = (0..bytes.len()).map(move |at| cut[..at].to_vec());
    let changes = (0..bytes.len()).flat_map(move |at| {
        let bytes = bytes.clone();
        [0x01, 0x80, 0xff].into_iter().map(move |mask| {
            let mut changed = bytes.clone();
            changed[at] ^= mask;
            changed
        })
    });
    cuts.chain(changes)
}

/// Panics of the crate `parquet` that the library contains would fill the test's output.
fn quietly(test: impl FnOnce()) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.location().is_some_and(|l| l.file().contains("tests/hostile.rs") || l.file().contains("updraft")) {
            hook(info);
        }
    }));
    test();
}

#[test]
fn damaged_parquet_is_an_error_or_a_result() {
    quietly(|| {
        check("plain.parquet", |path| read_all(path, PLAIN), everywhere(fixture("plain.parquet")).step_by(5));
        check("snappy.parquet", |path| read_all(path, PLAIN), everywhere(fixture("snappy.parquet")).step_by(13));
    });
}

#[test]
fn damaged_arrays_are_an_error_or_a_result() {
    let npz = |path: &Path| read_npz(path, 1_000_000).map(|_| ());
    check("compressed.npz", npz, everywhere(fixture("compressed.npz")).step_by(3));
    check("arrays.npz", npz, everywhere(fixture("arrays.npz")).step_by(17));
    let npy = |path: &Path| read_npy(path, 1_000_000).map(|_| ());
    check("fortran.npy", npy, everywhere(fixture("fortran.npy")));
}

#[test]
fn damaged_pictures_are_an_error_or_a_result() {
    for name in ["alpha.png", "palette.png", "colour.jpg"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        let recipe = "[[tensors]]\nname = \"image\"\ntransform = [{ decode = \"rgb\" }, { resize = [8, 8] }]";
        let read = |path: &Path| {
            std::fs::copy(path, dir.path().join("a").join(name)).unwrap();
            read_all(dir.path(), recipe)
        };
        check(name, read, everywhere(fixture(name)).step_by(3));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn parquet_with_many_changes_is_an_error_or_a_result(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        zstd: bool,
    ) {
        let mut bytes = fixture(if zstd { "types.parquet" } else { "plain.parquet" });
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("changed.parquet");
        std::fs::write(&path, bytes).unwrap();
        read_all(&path, PLAIN).ok();
    }

    #[test]
    fn any_text_as_csv_is_an_error_or_a_result(text in "[a-c,\"\n0-9.-]{0,60}") {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("any.csv");
        std::fs::write(&path, text).unwrap();
        read_all(&path, "").ok();
    }
}

/// A PNG of one claimed size and no pixels; its checksums are right.
fn png_claiming(width: u32, height: u32) -> Vec<u8> {
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(kind);
        crc.update(data);
        [&(data.len() as u32).to_be_bytes()[..], kind, data, &crc.sum().to_be_bytes()].concat()
    };
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 6, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &[]), chunk(b"IEND", &[])].concat()
}

#[test]
fn a_picture_that_claims_too_many_pixels_is_refused_undecoded() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    for (width, height) in [(100_000, 100_000), (u32::MAX >> 1, 1), (1, u32::MAX >> 1)] {
        std::fs::write(dir.path().join("a/bomb.png"), png_claiming(width, height)).unwrap();
        let error =
            read_all(dir.path(), "[[tensors]]\nname = \"image\"\ntransform = [{ decode = \"grey\" }]").unwrap_err();
        assert!(error.to_string().contains("bomb.png") && error.to_string().contains("claims"), "{error}");
    }
}

#[test]
fn an_archive_that_inflates_past_the_bound_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.npz");
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    archive.start_file("x.npy", zip::write::SimpleFileOptions::default()).unwrap();
    let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (50000000,), }\n";
    archive.write_all(b"\x93NUMPY\x01\x00").unwrap();
    archive.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
    archive.write_all(header.as_bytes()).unwrap();
    archive.write_all(&vec![0; 50_000_000]).unwrap();
    archive.finish().unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() < 100_000);
    let error = read_npz(&path, 1_000_000).unwrap_err().to_string();
    assert!(error.contains("[50000000]") && error.contains("1000000 bytes allowed"), "{error}");
}

#[test]
fn a_gzip_page_that_inflates_past_its_claim_is_refused_before_it_is_decoded() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.parquet");
    let schema = parquet::schema::parser::parse_message_type("message m { required binary text (utf8); }").unwrap();
    let gzip = parquet::basic::Compression::GZIP(Default::default());
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_compression(gzip)
        .set_dictionary_enabled(false)
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None)
        .build();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema.into(), properties.into()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    // Sixteen million zeros, which gzip to sixteen thousand bytes.
    column.typed::<ByteArrayType>().write_batch(&[ByteArray::from(vec![0; 1 << 24])], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let recipe = "[[tensors]]\nname = \"text\"\ntransform = [{ index_of = [\"x\"] }]";

    let honest = read_all(&path, recipe).unwrap_err().to_string();
    assert!(honest.contains("row group 0 takes 16.0 MiB"), "{honest}");

    // The same page claiming 100 bytes, in its header and in the footer.
    let bytes = std::fs::read(&path).unwrap();
    let zigzag = |n: u64| {
        let mut n = n << 1;
        let mut out = Vec::new();
        while n >= 0x80 {
            out.push((n & 0x7f) as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
        out
    };
    let claim = zigzag((1 << 24) + 4);
    // As many bytes as before: a varint may be padded.
    let mut lie = vec![0x80; claim.len() - 1];
    (lie[0], lie[1]) = (0xc8, 0x81);
    lie.push(0);
    let at = bytes.windows(claim.len()).position(|w| w == claim).unwrap();
    let mut lying = bytes.clone();
    lying[at..at + claim.len()].copy_from_slice(&lie);
    // The footer's total counts the header too.
    for header in 0..200 {
        let total = zigzag((1 << 24) + 4 + header);
        while let Some(at) = lying.windows(total.len()).rposition(|w| w == total) {
            lying[at..at + lie.len()].copy_from_slice(&lie);
        }
    }
    std::fs::write(&path, &lying).unwrap();
    let error = read_all(&path, recipe).unwrap_err().to_string();
    assert!(error.contains("inflates past the 100 bytes it claims"), "{error}");
}
