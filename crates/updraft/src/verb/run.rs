//! `updraft run`: a recipe from data to report.

use std::path::PathBuf;

use serde_json::{Map, Value, json};
use updraft_base::units;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::stage::{Results, Stages, optimize};
use crate::verb::eval;
use crate::{output, report, verb};

/// Do all that a recipe says: train, evaluate, optimize, export, report
///
/// Each stage is kept in the store under what determined it. A stage of which nothing has changed is reused, a training
/// that was killed goes on where it was. The model, what `[optimize]` made of it, `report.html` and `report.json`
/// are written to `runs/NAME` in the store's folder.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe: an `updraft.toml`, or the folder that holds it.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let stages = Stages::open(context, &args.recipe)?;
    let results = stages.run()?;
    let (report, page) = write_report(&stages, &results)?;
    let folder = context.files_dir().join("runs").join(&stages.loaded.name);
    let model = stages.store.get(&results.export.digest)?;
    let mut files = vec![
        ("model", folder.join("model.onnx"), model.to_vec()),
        ("report_json", folder.join("report.json"), report.1),
        ("report_html", folder.join("report.html"), page.1),
    ];
    let mut last = model;
    if let Some(optimized) = &results.optimized_export {
        last = stages.store.get(&optimized.digest)?;
        files.push(("optimized", folder.join("optimized.onnx"), last.to_vec()));
    }
    if let Some(path) = &stages.loaded.recipe.export.path {
        files.push(("export", stages.loaded.folder.join(path), last.to_vec()));
    }
    for (_, path, bytes) in &files {
        output::write(path, bytes)?;
    }
    let history = &results.trained.history;
    let mut artifacts = Map::new();
    for (split, data) in &results.data {
        artifacts.insert(format!("data_{split}"), json!(data.digest));
    }
    artifacts.insert("network".into(), json!(results.network.digest));
    artifacts.insert("model".into(), json!(results.trained.network.digest));
    artifacts.insert("history".into(), json!(results.trained.history_digest));
    artifacts.extend(results.evaluation.as_ref().map(|(_, digest)| ("evaluation".into(), json!(digest))));
    if let Some(optimized) = &results.optimized {
        artifacts.insert("optimized".into(), json!(optimized.network.digest));
        artifacts.extend(results.optimized_export.as_ref().map(|o| ("optimized_export".into(), json!(o.digest))));
        artifacts.insert("optimization".into(), json!(optimized.account_digest));
    }
    artifacts.insert("export".into(), json!(results.export.digest));
    artifacts.insert("report".into(), json!(report.0));
    artifacts.insert("report_html".into(), json!(page.0));
    let paths: Map<String, Value> = files.iter().map(|(name, path, _)| ((*name).to_owned(), json!(path))).collect();
    let json = json!({
        "name": stages.loaded.name,
        "model_digest": results.export.digest,
        "optimized_digest": results.optimized_export.as_ref().map(|o| o.digest),
        "metrics": report::metrics(&results),
        "seed": stages.seed,
        "training": { "steps": history.record.step, "elapsed_ns": history.elapsed_ns },
        "optimization": results.optimized.as_ref().map(optimize::summary),
        "artifacts": artifacts,
        "files": paths,
        "stages": stages.done(),
    });
    let mut text = String::new();
    if let Some((metrics, _)) = &results.evaluation {
        text.push_str(&eval::show(metrics));
    }
    text.push_str(&format!(
        "training    {} steps in {}\n",
        history.record.step,
        units::duration_ns(history.elapsed_ns)
    ));
    if let Some(optimized) = &results.optimized {
        text.push_str(&verb::optimize::show(optimized));
    }
    text.push_str(&format!("model       {}\n            {}\n", files[0].1.display(), results.export.digest));
    if let (Some(optimized), Some((_, path, _))) = (&results.optimized_export, files.get(3)) {
        text.push_str(&format!("optimized   {}\n            {}\n", path.display(), optimized.digest));
    }
    text.push_str(&format!("report      {}\n", files[2].1.display()));
    let answer = Answer { text, json };
    match &results.optimized {
        Some(optimized) => verb::optimize::answer(&optimized.account, answer),
        None => Ok(answer),
    }
}

type Kept = (updraft_base::Digest, Vec<u8>);

/// Keeps `report.json` and `report.html`.
fn write_report(stages: &Stages, results: &Results) -> Result<(Kept, Kept), Failure> {
    let mut parents = vec![results.export.digest, results.trained.history_digest];
    parents.extend(results.evaluation.as_ref().map(|(_, digest)| *digest));
    parents.extend(results.optimized.as_ref().map(|o| o.account_digest));
    let asked = json!({ "name": stages.loaded.name, "text": stages.loaded.text });
    let origin = |kind: &str| stages.origin(kind, asked.clone(), parents.clone());
    // Gathered once: both files say the same.
    let mut gathered = None;
    let (json_artifact, json_bytes) = stages.answer("report", origin("report"), || {
        let report = gathered.insert(report::gather(stages, results)?);
        let bytes = serde_json::to_vec_pretty(report).map_err(|e| Failure::of(Kind::Storage, &e))?;
        Ok((bytes, Map::new()))
    })?;
    let (page_artifact, page_bytes) = stages.answer("report.html", origin("report-html"), || {
        let report = match gathered {
            Some(report) => report,
            None => report::gather(stages, results)?,
        };
        Ok((report::page(&report).into_bytes(), Map::new()))
    })?;
    Ok(((json_artifact.digest, json_bytes), (page_artifact.digest, page_bytes)))
}
