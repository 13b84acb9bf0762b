//! Transformations give what is computed by hand, in the same shards whoever makes them.
#![cfg(feature = "datafusion")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use support::{ROWS, objects, options, read_all, samples, write};
use tempfile::TempDir;
use updraft_data::config::{Colour, Filter, Resize, Tokenize};
use updraft_data::ingest::{DecodeStep, ResizeStep, Step, TokenizeStep, commit, ingest};
use updraft_data::shards::Shards;
use updraft_data::{Access, Cells, Kind, Manifest, Rows, ShardFormat};
use updraft_graph::{DType, Tensor};
use updraft_query::{
    Query, QueryError, QueryOptions, Transform, TransformRecipe, Transformed, Workplace, WriteSection,
};

mod support;

const MEMORY_BYTES: u64 = 256 << 20;

/// A folder with the samples as a dataset.
fn workplace() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("samples"), ShardFormat::Mds, &samples());
    folder
}

fn recipe(folder: &Path, source: &str, target: &str, sql: Option<&str>, shard_rows: u64) -> TransformRecipe {
    TransformRecipe {
        source: folder.join(source).to_str().unwrap().to_owned(),
        target: folder.join(target).to_str().unwrap().to_owned(),
        sql: sql.map(str::to_owned),
        steps: Vec::new(),
        write: WriteSection { format: ShardFormat::Parquet, shard_rows: Some(shard_rows), ..WriteSection::default() },
    }
}

fn open(recipe: TransformRecipe, threads: usize) -> Result<Arc<Transform>, QueryError> {
    let workplace = Workplace { access: Access::default(), threads };
    Transform::open(recipe, MEMORY_BYTES, workplace).map(Arc::new)
}

fn run(recipe: TransformRecipe, threads: usize) -> Result<Transformed, QueryError> {
    open(recipe, threads)?.run(|_, _| {})
}

/// Pictures of digits with their labels.
fn digits() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/mnist/data/test.parquet")
}

fn numbers(rows: &Rows, column: &str) -> Vec<i64> {
    let Some(Cells::Numbers(tensor)) = rows.column(column) else { panic!("`{column}` holds no numbers") };
    tensor.to_i64().unwrap()
}

fn bytes<'a>(rows: &'a Rows, column: &str) -> &'a [Bytes] {
    let Some(Cells::Bytes(cells)) = rows.column(column) else { panic!("`{column}` holds no bytes") };
    cells
}

#[test]
fn rows_are_selected_and_their_pictures_resized_as_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let sql = "select label * 10 + 1 as marked, image from data where label in (3, 7)";
    let to = Resize { size: Some([14, 20]), shorter: None, filter: Filter::Bilinear, antialias: true };
    let mut small = recipe(folder.path(), digits().to_str().unwrap(), "small", Some(sql), 300);
    small.steps = vec![Step::Resize(ResizeStep { columns: vec!["image".into()], to: to.clone() })];
    let done = run(small, 3).unwrap();

    // Every picture resized by ingestion, then picked.
    let inputs = Shards::open(digits().to_str().unwrap(), None, 1 << 30, &Access::default()).unwrap().inputs().unwrap();
    let all_of_them = objects(&folder.path().join("all"));
    let mut ingestion = options(ShardFormat::Mds, 1000);
    ingestion.resize = [("image".to_owned(), to)].into();
    commit(&ingest(&inputs, &all_of_them, &ingestion, |_, _| {}).unwrap(), &ingestion, &all_of_them).unwrap();
    let all = read_all(folder.path().join("all").to_str().unwrap());
    let labels = numbers(&all, "label");
    let picked: Vec<usize> = (0..all.len()).filter(|row| [3, 7].contains(&labels[*row])).collect();

    let made = read_all(folder.path().join("small").to_str().unwrap());
    assert_eq!(made.schema.names(), ["marked", "image"]);
    assert_eq!(numbers(&made, "marked"), picked.iter().map(|row| labels[*row] * 10 + 1).collect::<Vec<_>>());
    assert!(bytes(&made, "image").iter().eq(picked.iter().map(|row| &bytes(&all, "image")[*row])));
    assert_eq!(done.units, all.len().div_ceil(300) as u64);
    assert_eq!(done.ingested.rows, picked.len() as u64);
    assert_eq!(done.whole_because, None);
}

#[test]
fn steps_make_numbers_of_pictures_and_tokens_of_text() {
    let folder = workplace();
    let mut pixels = recipe(folder.path(), digits().to_str().unwrap(), "pixels", None, 500);
    let decode =
        DecodeStep { columns: vec!["image".into()], colour: Colour::Grey, size: [28, 28], filter: Filter::default() };
    pixels.steps = vec![Step::Decode(decode)];
    run(pixels, 2).unwrap();
    let made = read_all(folder.path().join("pixels").to_str().unwrap());
    let image = &made.schema.columns[made.schema.index_of("image").unwrap()];
    assert_eq!(image.kind, Kind::Number { dtype: DType::U8, shape: vec![28, 28, 1] });
    let Some(Cells::Numbers(pixels)) = made.column("image") else { panic!("no numbers") };

    // What training sees of the same pictures.
    let config =
        format!("path = {:?}\ntensors = [{{ name = \"image\", transform = [{{ decode = \"grey\" }}] }}]", digits());
    let dataset = updraft_data::Dataset::open(&toml_of(&config), Path::new("/")).unwrap();
    let loader = updraft_data::LoaderOptions { batch_size: 100, threads: 0, ..Default::default() };
    let loader = updraft_data::Loader::new(Arc::new(dataset), loader).unwrap();
    let first = loader.batches(0..1).unwrap().next().unwrap().unwrap();
    let rows = first.tensors[0].1.len() / (28 * 28);
    assert_eq!(first.tensors[0].1.bytes(), &pixels.bytes()[..rows * 28 * 28]);

    let tokenize = |length| {
        let to = Tokenize { file: None, length, pad: -1, output: Default::default(), special_tokens: true };
        vec![Step::Tokenize(TokenizeStep { columns: vec!["name".into()], to })]
    };
    for (length, target) in [(None, "lists"), (Some(3), "padded")] {
        let mut tokens = recipe(folder.path(), "samples", target, Some("select name from data where id < 12"), 100);
        tokens.steps = tokenize(length);
        run(tokens, 2).unwrap();
    }
    let names: Vec<String> = (0..12).map(|id| format!("n{}", id % 11)).collect();
    let lists = read_all(folder.path().join("lists").to_str().unwrap());
    let list = |name: &String| Tensor::vector(&name.bytes().map(i64::from).collect::<Vec<_>>());
    assert_eq!(lists.columns, [Cells::Lists(names.iter().map(list).collect())]);
    let padded = |name: &String| name.bytes().map(i64::from).chain([-1; 3]).take(3).collect::<Vec<_>>();
    let made = read_all(folder.path().join("padded").to_str().unwrap());
    assert_eq!(numbers(&made, "name"), names.iter().flat_map(padded).collect::<Vec<_>>());
}

fn toml_of(text: &str) -> updraft_data::DatasetConfig {
    toml::from_str(text).unwrap()
}

#[test]
fn without_sql_and_steps_a_transformation_is_an_ingestion() {
    let folder = workplace();
    let source = folder.path().join("samples");
    let inputs = Shards::open(source.to_str().unwrap(), None, 1 << 30, &Access::default()).unwrap().inputs().unwrap();
    let mut ingestion = options(ShardFormat::Parquet, 90);
    ingestion.write = Default::default();
    let target = objects(&folder.path().join("ingested"));
    let ingested = ingest(&inputs, &target, &ingestion, |_, _| {}).unwrap();
    let version = commit(&ingested, &ingestion, &target).unwrap();
    let done = run(recipe(folder.path(), "samples", "transformed", None, 90), 3).unwrap();
    assert_eq!(done.version, version);
}

#[test]
fn units_of_which_no_row_is_left_are_done_and_have_no_shard() {
    let folder = workplace();
    let late =
        |target: &str| recipe(folder.path(), "samples", target, Some("select id, x from data where id >= 333"), 100);
    let done = run(late("late"), 2).unwrap();
    assert_eq!((done.units, done.empty_units, done.ingested.shards.len(), done.ingested.made), (7, 3, 4, 4));
    let made = read_all(folder.path().join("late").to_str().unwrap());
    assert_eq!(numbers(&made, "id"), (333..ROWS as i64).collect::<Vec<_>>());

    let again = run(late("late"), 1).unwrap();
    assert_eq!((again.empty_units, again.ingested.made, again.version), (3, 0, done.version));
    // Two at the same time are as one.
    let both = open(late("both"), 2).unwrap();
    let made: u64 = std::thread::scope(|scope| {
        let runs = [(), ()].map(|()| scope.spawn(|| both.run(|_, _| {}).unwrap()));
        runs.into_iter().map(|run| run.join().unwrap().ingested.made).sum()
    });
    assert_eq!(made, 4);
    let version = Manifest::load(&objects(&folder.path().join("both")), None).unwrap().unwrap().digest;
    assert_eq!(version, done.version);
}

#[test]
fn sql_that_looks_at_rows_one_by_one_is_cut_into_units_and_other_sql_is_not() {
    let folder = workplace();
    for (sql, rows, because) in [
        ("select * from data", ROWS, None),
        ("select 1 as one from data", ROWS, None),
        ("select d.id + 1 as next from (select id from data where x > 3) d", 525, None),
        ("select id, unnest([1, 2, 3]) as n from data where id % 7 = 0", 300, None),
        ("select label, count(*) as n from data group by label order by label", 5, Some("it orders rows")),
        ("select label, count(*) as n from data group by label", 5, Some("it groups rows")),
        ("select id from data order by x, id", ROWS, Some("it orders rows")),
        ("select id from data limit 13", 13, Some("it limits the number of rows")),
        ("select distinct name from data", 11, Some("it leaves out repeated rows")),
        ("select a.id from data a join data b on a.id = b.id + 1", ROWS - 1, Some("it joins rows")),
        ("select id from data union all select id from data", 2 * ROWS, Some("several selections")),
        ("select id from data where x > (select avg(x) from data)", 350, Some("it has a subquery")),
        ("select id, row_number() over () as n from data", ROWS, Some("a window")),
    ] {
        let target = format!("{:x}", sql.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31) + u64::from(byte)));
        let done =
            run(recipe(folder.path(), "samples", &target, Some(sql), 100), 3).unwrap_or_else(|e| panic!("{sql}: {e}"));
        assert_eq!(done.units, if because.is_some() { 1 } else { 7 }, "{sql}");
        assert_eq!(done.whole_because.is_some(), because.is_some(), "{sql}");
        if let (Some(reason), Some(expected)) = (&done.whole_because, because) {
            assert!(reason.contains(expected), "{sql}: {reason}");
        }

        // The whole query, asked at once.
        let plain = sql.replace("from data", "from 'samples'").replace("join data", "join 'samples'");
        let query = Query::plan(&plain, &[], &QueryOptions { threads: 2, memory_bytes: MEMORY_BYTES }, |name| {
            Shards::open(folder.path().join(name).to_str().unwrap(), None, 1 << 30, &Access::default())
        });
        let answer = query.unwrap().first_rows(10_000).unwrap();
        let made = read_all(folder.path().join(&target).to_str().unwrap());
        assert_eq!((made.len(), answer.len()), (rows, rows), "{sql}");
        let column = made.schema.columns.iter().find(|column| column.kind == Kind::scalar(DType::I64));
        if let Some(column) = column {
            let expected: Vec<i64> = answer.json().iter().map(|row| row[&column.name].as_i64().unwrap()).collect();
            assert_eq!(numbers(&made, &column.name), expected, "{sql}");
        }
    }
}

#[test]
fn steps_follow_sql_that_needs_all_rows() {
    let folder = workplace();
    let mut longest =
        recipe(folder.path(), "samples", "names", Some("select distinct name from data order by name"), 4);
    longest.steps = vec![Step::Tokenize(TokenizeStep {
        columns: vec!["name".into()],
        to: Tokenize { file: None, length: Some(3), pad: 0, output: Default::default(), special_tokens: true },
    })];
    let done = run(longest.clone(), 2).unwrap();
    assert_eq!((done.units, done.ingested.shards.len(), done.ingested.made), (1, 3, 3));
    let made = read_all(folder.path().join("names").to_str().unwrap());
    let text = |tokens: &[i64]| String::from_utf8(tokens.iter().map(|t| *t as u8).collect()).unwrap();
    let names: Vec<String> = numbers(&made, "name").chunks(3).map(text).collect();
    assert_eq!(names[..4], ["n0\0", "n1\0", "n10", "n2\0"]);
    let again = run(longest, 1).unwrap();
    assert_eq!((again.ingested.made, again.version), (0, done.version));
}

#[test]
fn the_same_bytes_come_of_any_number_of_threads_and_others_of_another_source() {
    let folder = workplace();
    let sql = "select id, 1.0 / (id + 1) as part, name from data where label <> 2";
    let version = |source: &str, target: &str, threads| {
        run(recipe(folder.path(), source, target, Some(sql), 64), threads).unwrap().version
    };
    let one = version("samples", "one", 1);
    assert_eq!(version("samples", "four", 4), one);
    let mut rows = samples();
    rows.columns.swap(0, 1);
    rows = Rows::new(rows.schema.clone(), rows.columns).unwrap();
    write(&folder.path().join("others"), ShardFormat::Mds, &rows);
    assert_ne!(version("others", "five", 4), one);
}

#[test]
fn what_is_wrong_with_a_transformation_is_said_in_its_words_and_nothing_is_committed() {
    let folder = workplace();
    let step = |text: &str| serde_json::from_str::<Step>(text).unwrap();
    let mut messages = String::new();
    for (sql, steps) in [
        (Some("select lable from data"), vec![]),
        (Some("select id from dada"), vec![]),
        (Some("select data.id from data, samples"), vec![]),
        (Some("select 1 as one"), vec![]),
        (Some("explain select id from data"), vec![]),
        (Some("delete from data"), vec![]),
        (Some("select id, id from data"), vec![]),
        (Some("select cast('2024-05-01' as date) as day from data"), vec![]),
        (Some("select id from data where id < 0"), vec![]),
        (Some("select case when id > 650 then id end as late from data"), vec![]),
        (Some("select 1 / (id - 5) as part from data"), vec![]),
        (None, vec![r#"{"resize": {"columns": ["picture"], "to": [8, 8]}}"#]),
        (None, vec![r#"{"resize": {"columns": ["name"], "to": [8, 8]}}"#]),
        (None, vec![r#"{"resize": {"columns": ["Picture"], "to": [8, 0]}}"#]),
        (None, vec![r#"{"resize": {"columns": ["Picture"], "to": [8, 8]}}"#]),
        (None, vec![r#"{"decode": {"columns": ["Picture"], "colour": "grey", "size": [8, 8]}}"#]),
        (None, vec![r#"{"tokenize": {"columns": ["label"]}}"#]),
        (None, vec![r#"{"tokenize": {"columns": ["name"], "to": {"length": 0}}}"#]),
        (Some("select id from data"), vec![r#"{"tokenize": {"columns": ["name"]}}"#]),
    ] {
        let mut wrong = recipe(folder.path(), "samples", "wrong", sql, 100);
        wrong.steps = steps.iter().map(|text| step(text)).collect();
        let what = sql.unwrap_or(steps.first().copied().unwrap_or_default());
        let error = run(wrong, 2).err().unwrap_or_else(|| panic!("{what} succeeded"));
        messages.push_str(&format!("{what}\n    {error}\n"));
    }
    let missing = run(recipe(folder.path(), "mising", "wrong", Some("select id from data"), 100), 1).unwrap_err();
    messages.push_str(&format!("source that is not there\n    {missing}\n"));
    let mut csv = recipe(folder.path(), "samples", "wrong", None, 100);
    csv.write.format = ShardFormat::Csv;
    messages.push_str(&format!("format that is not written\n    {}\n", run(csv, 1).unwrap_err()));
    let small = recipe(folder.path(), "samples", "wrong", None, 700);
    let small = Transform::open(small, 100 << 10, Workplace { access: Access::default(), threads: 1 });
    messages.push_str(&format!("memory that is too small\n    {}\n", small.err().unwrap()));
    assert!(Manifest::load(&objects(&folder.path().join("wrong")), None).unwrap().is_none());
    let folder = folder.path().to_str().unwrap();
    insta::assert_snapshot!("wrong", messages.replace(folder, "…"));
}
