//! `updraft generate`: text from a language model.

use std::path::PathBuf;

use serde_json::json;
use updraft_base::{Key, units};
use updraft_data::Vocabulary;
use updraft_graph::{Model, Tensor};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::model;

/// Write text with a character model
///
/// The model takes token numbers [N, T] and gives logits [N, T, V]. What the numbers stand for and how long a sequence
/// may be stands in its metadata, where `updraft run` has put it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// The text to go on from.
    #[arg(long, value_name = "TEXT", default_value = "\n", hide_default_value = true)]
    prompt: String,

    /// Characters to write.
    #[arg(long, value_name = "N", default_value_t = 200)]
    tokens: usize,

    /// Divides the logits: below 1 the likely becomes likelier; 0 always takes the likeliest.
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f32,

    /// Draw among the N likeliest characters only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        let message = format!("--temperature must be a number from 0 on, found {}", args.temperature);
        return Err(Failure::new(Kind::Usage, message));
    }
    let loaded = model::load(&args.model)?;
    let (vocabulary, context_length) =
        language(&loaded.model).map_err(|problem| Failure::new(Kind::Input, problem).about(&args.model))?;
    let mut tokens = vocabulary.encode(&args.prompt).map_err(|e| Failure::of(Kind::Input, &e))?;
    if tokens.is_empty() {
        return Err(Failure::new(Kind::Usage, "--prompt must have at least one character"));
    }
    let graph = &loaded.model.graph;
    let inputs = model::inputs(graph);
    let [input] = inputs[..] else {
        let message = format!("a language model has one input, found {}", inputs.len());
        return Err(Failure::new(Kind::Input, message).about(&args.model));
    };
    let input = graph.value(input).name.clone();
    let mut session = model::compile(graph, context.threads)?;
    let key = Key::new(context.seed.unwrap_or(0)).child("generate");
    let start_ns = context.clock.monotonic_ns();
    let task = context.progress.task("generate", args.tokens as u64, "characters");
    let prompt_length = tokens.len();
    for i in 0..args.tokens {
        let window = &tokens[tokens.len().saturating_sub(context_length)..];
        let batch = Tensor::new(&[1, window.len()], window).map_err(|e| Failure::of(Kind::Input, &e))?;
        let outputs = session.run(&[(&input, &batch)])?;
        let logits = outputs.first().and_then(|t| t.as_slice::<f32>().ok()).unwrap_or_default();
        let Some(scores) = logits.len().checked_sub(vocabulary.len()).map(|at| &logits[at..]) else {
            let message = format!("its first output is not f32 logits over the {} characters", vocabulary.len());
            return Err(Failure::new(Kind::Input, message).about(&args.model));
        };
        tokens.push(draw(scores, args.temperature, args.top_k, key.uniform_f32(i as u64)) as i64);
        task.at(i as u64 + 1, String::new);
    }
    task.finish();
    let elapsed_ns = context.clock.monotonic_ns() - start_ns;
    context.progress.note(&format!("{} characters in {}", args.tokens, units::duration_ns(elapsed_ns)));
    let text: String = tokens.iter().filter_map(|t| vocabulary.decode(*t)).collect();
    let written: String = tokens[prompt_length..].iter().filter_map(|t| vocabulary.decode(*t)).collect();
    let json = json!({ "model": loaded.digest, "prompt": args.prompt, "text": written, "elapsed_ns": elapsed_ns });
    Ok(Answer { text: format!("{text}\n"), json })
}

/// The characters and the longest sequence of a language model.
fn language(model: &Model) -> Result<(Vocabulary, usize), String> {
    let lacks =
        |key: &str| format!("its metadata has no `{key}`: it is no character model that `updraft run` exported");
    let characters = model::metadata(model, model::VOCABULARY_KEY).ok_or_else(|| lacks(model::VOCABULARY_KEY))?;
    let context = model::metadata(model, model::CONTEXT_KEY).ok_or_else(|| lacks(model::CONTEXT_KEY))?;
    let context = context.parse().ok().filter(|n| *n > 0);
    let context = context.ok_or_else(|| format!("its metadata `{}` is not a length", model::CONTEXT_KEY))?;
    let vocabulary = Vocabulary::of(characters);
    if vocabulary.is_empty() {
        return Err(format!("its metadata `{}` has no characters", model::VOCABULARY_KEY));
    }
    Ok((vocabulary, context))
}

/// The place that `point` in [0, 1) falls on when the unit interval is dealt out by softmax of `scores / temperature`.
/// The first of equal scores comes first.
fn draw(scores: &[f32], temperature: f32, top_k: Option<u32>, point: f32) -> usize {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    if temperature == 0.0 {
        return order[0];
    }
    order.truncate(top_k.map_or(scores.len(), |k| k as usize));
    let greatest = f64::from(scores[order[0]]);
    let weights: Vec<f64> =
        order.iter().map(|i| ((f64::from(scores[*i]) - greatest) / f64::from(temperature)).exp()).collect();
    let mut left = f64::from(point) * weights.iter().sum::<f64>();
    for (i, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *i;
        }
    }
    // Rounding may leave a rest behind the last.
    order[order.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::draw;

    #[test]
    fn draws_follow_the_softmax() {
        // Shares 2/3 and 1/3 at temperature 1, 4/5 and 1/5 at one half.
        let scores = [0.0, std::f32::consts::LN_2];
        let share = |temperature, top_k| {
            let draws = (0..10_000).map(|i| draw(&scores, temperature, top_k, i as f32 / 10_000.0));
            draws.filter(|i| *i == 1).count()
        };
        assert_eq!(share(1.0, None), 6667);
        assert_eq!(share(0.5, None), 8000);
        assert_eq!(share(0.0, None), 10_000);
        assert_eq!(share(1.0, Some(1)), 10_000);
    }
}
