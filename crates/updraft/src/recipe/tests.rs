//! What a recipe may say, and what is said of one that is wrong.

use super::*;

const RECIPE: &str = r#"
[model]
zoo = "mlp"

[data.train]
path = "train.npz"

[train]
steps = 10
batch = 4

[train.optimizer.sgd]
momentum = 0.9

[train.learning_rate]
peak = 0.1
"#;

/// The message about [`RECIPE`] with the first `from` replaced by `to`.
fn message(from: &str, to: &str) -> String {
    assert!(RECIPE.contains(from), "{from}");
    parse(&RECIPE.replacen(from, to, 1), Path::new("updraft.toml")).unwrap_err().to_string()
}

#[test]
fn a_small_recipe_is_enough() {
    let recipe = parse(RECIPE, Path::new("updraft.toml")).unwrap();
    assert_eq!(recipe.train.loss, LossSection::CrossEntropy(CrossEntropySection::default()));
    assert_eq!(recipe.train.seed, 0);
}

#[test]
fn unknown_keys_are_named_with_line_and_nearest_known_key() {
    let rows = [
        ("batch = 4", "bacth = 4", "updraft.toml:10: unknown key `bacth`, did you mean `batch`?"),
        ("momentum = 0.9", "momentun = 0.9", "updraft.toml:13: unknown key `momentun`, did you mean `momentum`?"),
        ("optimizer.sgd", "optimizer.sdg", "updraft.toml:12: unknown key `sdg`, did you mean `sgd`?"),
        ("path = \"train.npz\"", "pth = \"a\"", "updraft.toml:6: unknown key `pth`, did you mean `path`?"),
        ("peak = 0.1", "peak = 0.1\n[evaluat]", "updraft.toml:17: unknown key `evaluat`, did you mean `evaluate`?"),
        (
            "peak = 0.1",
            "peak = 0.1\nshape = { cosin = {} }",
            "updraft.toml:17: unknown key `cosin`, did you mean `cosine`?",
        ),
        ("steps = 10", "steps = 10\nfrobnicate = 1", "updraft.toml:10: unknown key `frobnicate`; known here: steps, "),
    ];
    for (from, to, expected) in rows {
        let found = message(from, to);
        assert!(found.contains(expected), "{to}: {found}");
    }
}

#[test]
fn limits_of_a_search_are_written_with_their_units() {
    let rows = [
        ("max_drop = \"1\"", "updraft.toml:18: `1` is not a percentage"),
        ("time_limit = \"30\"", "updraft.toml:18: `30` is not a time"),
        ("target = \"sse2\"", "updraft.toml:18: unknown key `sse2`"),
        (
            "prune = { ratios = [0.5, 0.25] }",
            "`optimize.prune.ratios` must be shares between 0 and 1, in growing order",
        ),
        ("max_dorp = \"1%\"", "did you mean `max_drop`?"),
    ];
    for (line, expected) in rows {
        let found = message("peak = 0.1", &format!("peak = 0.1\n[optimize]\n{line}"));
        assert!(found.contains(expected), "{line}: {found}");
    }
}

#[test]
fn wrong_values_are_named_with_line_and_what_is_wrong() {
    let rows = [
        ("steps = 10", "steps = 10\nepochs = 1", "updraft.toml:10: `train.epochs` and `steps` exclude each other"),
        ("steps = 10\n", "", "updraft.toml:8: `train` needs `steps` or `epochs`"),
        ("batch = 4", "batch = 0", "updraft.toml:10: `train.batch` must be at least 1"),
        ("batch = 4", "batch = \"x\"", "updraft.toml:10: invalid type: string \"x\", expected usize"),
        ("batch = 4", "batch = ", "updraft.toml:10:"),
        ("zoo = \"mlp\"", "zoo = \"mlp\"\nonnx = \"a\"", "updraft.toml:4: `model.onnx` and `zoo` exclude each other"),
        (
            "steps = 10",
            "steps = 10\nvalidate = { every_steps = 5 }",
            "updraft.toml:10: `train.validate` needs `[data.validation]`",
        ),
    ];
    for (from, to, expected) in rows {
        let found = message(from, to);
        assert!(found.contains(expected), "{to}: {found}");
    }
}

#[test]
fn how_often_checkpoints_are_taken_is_no_part_of_what_determines_a_run() {
    let often = RECIPE.replace("batch = 4", "batch = 4\ncheckpoint = { every_steps = 1 }");
    let json = |text: &str| serde_json::to_value(parse(text, Path::new("")).unwrap()).unwrap();
    assert_eq!(json(RECIPE), json(&often));
}
