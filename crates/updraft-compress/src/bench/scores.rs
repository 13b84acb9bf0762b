//! Drops on the bench: scores on a split, looked at until the answer is clear.

use serde_json::json;

use super::Bench;
use crate::arithmetic::{Arithmetic, Emulated};
use crate::candidate::Candidate;
use crate::error::CompressError;
use crate::interval::Verdict;
use crate::measure::{Answers, Compiled, Scores};
use crate::search::Judgement;
use crate::splits::{Part, looks};

/// The search leaves time for the original and this many candidates to be scored on the holdout, at the pace of the
/// search split: the first is nearly always confirmed.
const HOLDOUT_CANDIDATES: u64 = 2;

impl Bench<'_> {
    /// How a model answers under another arithmetic, beside its answers under exact sums: the drop on the first samples
    /// of the holdout.
    pub fn drop_elsewhere(
        &mut self,
        candidate: &Candidate,
        arithmetic: Arithmetic,
        samples: u64,
    ) -> Result<Judgement, CompressError> {
        self.deadline_ns = self.settings.deadline_ns;
        self.hold(candidate)?;
        let current = self.held()?;
        let mut answers = Emulated::new(&current.graph, self.tools.task, arithmetic)?;
        let mut exact = Compiled::new(self.tools.engine, &current.graph, self.tools.task)?;
        let (mut here, mut there) = (Scores::default(), Scores::default());
        for batch in self.tools.splits.holdout.batches(0)? {
            if here.len() as u64 >= samples {
                break;
            }
            self.check_time()?;
            let batch = batch?;
            here.add(self.tools.task, &batch, &exact.answer(&batch)?)?;
            there.add(self.tools.task, &batch, &answers.answer(&batch)?)?;
        }
        Ok(self.judgement(&here, &there, self.settings.alpha))
    }

    /// The scores of a candidate on at least the first `samples` of a split, or on all.
    fn scores(&mut self, candidate: &Candidate, part: Part, samples: u64) -> Result<Scores, CompressError> {
        self.hold(candidate)?;
        let digest = self.held()?.artifact.digest;
        let source = self.tools.splits.part(part).clone();
        let mut scores = self.scores.remove(&(digest, part)).unwrap_or_default();
        let mut from = 0;
        for look in looks(source.len(), self.settings.alpha).iter() {
            let to = look.samples.div_ceil(source.batch_size());
            if from * source.batch_size() >= samples {
                break;
            }
            if (scores.len() as u64) < (to * source.batch_size()).min(source.len()) {
                let recipe = json!({
                    "data": source.key(), "from": from, "to": to,
                    "task": format!("{:?}", self.tools.task), "arithmetic": self.settings.arithmetic,
                });
                let origin = self.origin("scores", recipe, vec![digest]);
                let before_ns = self.tools.clock.monotonic_ns();
                let block = self.kept(&origin, |bench| {
                    let mut block = Scores::default();
                    for batch in source.batches(from)?.take((to - from) as usize) {
                        let batch = batch?;
                        let output = bench.answer(&batch)?;
                        block.add(bench.tools.task, &batch, &output)?;
                    }
                    Ok(block)
                });
                match block {
                    Ok(block) => {
                        if part == Part::Search {
                            self.reserve(self.tools.clock.monotonic_ns() - before_ns, block.len() as u64);
                        }
                        scores.extend(block);
                    }
                    Err(error) => {
                        self.scores.insert((digest, part), scores);
                        return Err(error);
                    }
                }
            }
            from = to;
        }
        self.scores.insert((digest, part), scores.clone());
        Ok(scores)
    }

    /// Ends the search early enough for the holdout, given how long some samples took; at most half of the time is kept
    /// free.
    fn reserve(&mut self, elapsed_ns: u64, samples: u64) {
        let per_sample_ns = elapsed_ns / samples.max(1);
        let needed_ns =
            per_sample_ns.saturating_mul(self.tools.splits.holdout.len()).saturating_mul(HOLDOUT_CANDIDATES + 1);
        let most_ns = self.settings.deadline_ns.saturating_sub(self.start_ns) / 2;
        self.deadline_ns = self.deadline_ns.min(self.settings.deadline_ns - needed_ns.min(most_ns));
    }

    /// Looks at a split until the answer is clear. Where the time ends before, what was seen of the holdout counts.
    pub(super) fn judge(
        &mut self,
        candidate: &Candidate,
        part: Part,
        limit: f64,
        alpha: f64,
        stops_within: bool,
    ) -> Result<Judgement, CompressError> {
        let source = self.tools.splits.part(part);
        let (len, batch_size) = (source.len(), source.batch_size());
        let mut last = None;
        for look in looks(len, alpha).iter() {
            // Whole batches: the samples that are there anyway.
            let samples = (look.samples.div_ceil(batch_size) * batch_size).min(len);
            let both = self
                .scores(&Candidate::default(), part, samples)
                .and_then(|original| Ok((original, self.scores(candidate, part, samples)?)));
            let (original, scores) = match both {
                Err(CompressError::TimeLimit) if last.is_some() && part == Part::Holdout => break,
                both => both?,
            };
            let samples = samples as usize;
            let judgement = self.judgement(&original.first(samples), &scores.first(samples), look.alpha);
            let verdict = Verdict::of(&judgement.drop, limit);
            last = Some(judgement);
            if verdict == Verdict::Beyond || (verdict == Verdict::Within && stops_within) {
                break;
            }
        }
        last.ok_or(CompressError::NoSearchData)
    }

    pub(super) fn judgement(&self, original: &Scores, candidate: &Scores, alpha: f64) -> Judgement {
        let metric = self.settings.metric;
        Judgement {
            drop: metric.drop(original, candidate, alpha),
            samples: candidate.len() as u64,
            original: metric.value(original),
            candidate: metric.value(candidate),
        }
    }
}
