//! The search against a made-up model: what it chooses, and that limits, time and order do not change it wrongly.

use std::collections::BTreeSet;

use updraft_base::Key;

use super::*;
use crate::candidate::{Calibrator, Rounding};

/// A model of ten units whose drops add up: unit `i` in int8 costs `harm[i]`, pruning its ratio times `pruning_harm`.
struct Fake {
    harm: Vec<f64>,
    pruning_harm: f64,
    /// How far the holdout's drop lies above the search split's.
    optimism: f64,
    /// Time of a quantized unit over that of one in float.
    int8_time: f64,
    /// What is left of the harm where rounding is learned, values are wide, the rounding is trained with; and of that of
    /// pruning after a longer recovery.
    left: Left,
    /// Answers that are left before the time is over.
    answers: Option<usize>,
    asked: Vec<String>,
}

struct Left {
    learned: f64,
    wide: f64,
    aware: f64,
    longer: f64,
}

impl Fake {
    fn new(harm: &[f64]) -> Fake {
        Fake {
            harm: harm.to_vec(),
            pruning_harm: 0.01,
            optimism: 0.0,
            int8_time: 0.3,
            left: Left { learned: 1.0, wide: 1.0, aware: 1.0, longer: 1.0 },
            answers: None,
            asked: Vec::new(),
        }
    }

    fn ask(&mut self, what: &str, candidate: &Candidate) -> Result<(), Trouble> {
        self.asked.push(format!("{what} {}", candidate.name()));
        if let Some(left) = &mut self.answers {
            *left = left.checked_sub(1).ok_or(Trouble::TimeLimit)?;
        }
        match candidate.form {
            Form::Dynamic => Err(Trouble::Refused("no products".to_owned())),
            _ => Ok(()),
        }
    }

    fn quantized(&self, candidate: &Candidate) -> Vec<usize> {
        let form = candidate.static_form();
        let is_int8 = |i: &usize| form.is_some_and(|f| !f.float_units.contains(&unit(*i)));
        (0..self.harm.len()).filter(is_int8).collect()
    }

    fn drop(&self, candidate: &Candidate) -> f64 {
        let pruned = candidate.pruning.as_ref().map_or(0.0, |pruning| {
            let left = if pruning.recovery_steps > 10 { self.left.longer } else { 1.0 };
            pruning.ratio * self.pruning_harm * left
        });
        let Some(form) = candidate.static_form() else { return pruned };
        let factors = [
            (form.calibrator != Calibrator::Entropy, 1.5),
            (form.mse_weights, 0.9),
            (form.equalized, 1.2),
            (form.smoothed, 1.1),
            (form.rounding == Rounding::Learned, self.left.learned),
            (form.wide, self.left.wide),
            (form.aware_steps > 0, self.left.aware),
        ];
        let factor: f64 = factors.iter().filter(|(on, _)| *on).map(|(_, factor)| factor).product();
        pruned + factor * self.quantized(candidate).iter().map(|i| self.harm[*i]).sum::<f64>()
    }

    fn judgement(drop: f64, error: f64) -> Judgement {
        let drop = Interval { estimate: drop, low: drop - error, high: drop + error };
        Judgement { drop, samples: 1000, original: 0.9, candidate: 0.9 - drop.estimate }
    }
}

fn unit(i: usize) -> String {
    format!("unit_{i}")
}

impl Workbench for Fake {
    fn make(&mut self, candidate: &Candidate) -> Result<Made, Trouble> {
        self.ask("make", candidate)?;
        let kept = candidate.pruning.as_ref().map_or(1.0, |p| 1.0 - p.ratio);
        let int8 = self.quantized(candidate).len() as f64;
        let mut size = (self.harm.len() as f64 * 4.0 - 3.0 * int8) * kept * 1000.0;
        if let Form::WeightOnly(form) = &candidate.form {
            // A scale of 32 bits a block.
            size *= (f64::from(form.bits) + 32.0 / form.block as f64) / 32.0;
        }
        let int8 = self.quantized(candidate);
        let form = |i: &usize| if int8.contains(i) { "int8" } else { "float" }.to_owned();
        let decide = |i: usize| Decision { unit: unit(i), form: form(&i), reason: "as asked".to_owned() };
        let decisions =
            if candidate.static_form().is_some() { (0..self.harm.len()).map(decide).collect() } else { vec![] };
        Ok(Made { size_bytes: size as u64, decisions })
    }

    fn divergence(&mut self, candidate: &Candidate) -> Result<f64, Trouble> {
        self.ask("divergence", candidate)?;
        Ok(self.drop(candidate))
    }

    fn search_drop(&mut self, candidate: &Candidate, _: f64) -> Result<Judgement, Trouble> {
        self.ask("search", candidate)?;
        Ok(Fake::judgement(self.drop(candidate), 0.001))
    }

    fn holdout_drop(&mut self, candidate: &Candidate, _: f64, _: f64) -> Result<Judgement, Trouble> {
        self.ask("holdout", candidate)?;
        Ok(Fake::judgement(self.drop(candidate) + self.optimism, 0.001))
    }

    fn speed(&mut self, candidate: &Candidate) -> Result<Speed, Trouble> {
        self.ask("speed", candidate)?;
        let n = self.harm.len() as f64;
        let int8 = self.quantized(candidate).len() as f64;
        let kept = candidate.pruning.as_ref().map_or(1.0, |p| 1.0 - p.ratio);
        let is_wide = candidate.static_form().is_some_and(|form| form.wide);
        let int8_time = if is_wide { 1.2 } else { self.int8_time };
        let ratio = (n - int8 + int8 * int8_time) / n * kept;
        let interval = |v: f64| Interval { estimate: v, low: 0.99 * v, high: 1.01 * v };
        Ok(Speed {
            latency_ratio: interval(ratio),
            latency_ns: interval(1e6 * ratio),
            cost_ns: Some(interval(5e5 * ratio)),
        })
    }

    fn sensitivity(&mut self, _: &StaticForm) -> Result<Vec<UnitSensitivity>, Trouble> {
        self.ask("sensitivity", &Candidate::default())?;
        let share = 1.0 / self.harm.len() as f64;
        let of = |(i, harm): (usize, &f64)| UnitSensitivity {
            unit: unit(i),
            op: "Conv".to_owned(),
            flops_share: share,
            divergence: *harm,
        };
        Ok(self.harm.iter().enumerate().map(of).collect())
    }

    fn note(&mut self, _: &str) {}
}

fn settings(objective: Objective, max_drop: f64) -> SearchSettings {
    let pruning = [0.25, 0.5].map(|ratio| Pruning { ratio, recovery_steps: 10 });
    SearchSettings {
        objective,
        max_drop,
        alpha: 0.05,
        pruning: pruning.to_vec(),
        aware_steps: 0,
        reduced_range: false,
        symmetric: false,
    }
}

fn chosen(outcome: &Outcome) -> &Trial {
    &outcome.trials[outcome.chosen]
}

#[test]
fn a_harmless_model_is_pruned_and_quantized_whole_with_the_recipes_that_help() {
    let mut fake = Fake::new(&[1e-5; 10]);
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    let trial = chosen(&outcome);
    let form = trial.candidate.static_form().unwrap();
    assert_eq!((form.calibrator, form.mse_weights, form.equalized), (Calibrator::Entropy, true, false));
    assert!(form.float_units.is_empty());
    assert_eq!(trial.candidate.pruning.as_ref().map(|p| p.ratio), Some(0.5));
    assert!(trial.holdout.as_ref().unwrap().drop.high <= 0.01);
    assert!(outcome.front.contains(&outcome.chosen) && outcome.missed.is_none());
}

#[test]
fn the_fewest_harmful_units_go_to_float() {
    let mut harm = [1e-5; 10];
    (harm[3], harm[7]) = (0.05, 0.02);
    let mut fake = Fake { pruning_harm: 1.0, ..Fake::new(&harm) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    let form = chosen(&outcome).candidate.static_form().unwrap();
    assert_eq!(form.float_units, BTreeSet::from([unit(3), unit(7)]));
    let in_float: Vec<&str> = outcome.decisions.iter().filter(|d| d.form == "float").map(|d| d.unit.as_str()).collect();
    assert_eq!(in_float, ["unit_3", "unit_7"]);
}

#[test]
fn what_misses_the_limit_is_mended_by_the_first_way_that_suffices() {
    let harm = [2e-3; 10];
    let found = |left: Left, objective, aware_steps| {
        let mut fake = Fake { left, pruning_harm: 1.0, ..Fake::new(&harm) };
        let outcome = search(&mut fake, &SearchSettings { aware_steps, ..settings(objective, 0.01) }).unwrap();
        (chosen(&outcome).candidate.clone(), outcome)
    };
    let none = || Left { learned: 1.0, wide: 1.0, aware: 1.0, longer: 1.0 };
    let (learned, outcome) = found(Left { learned: 0.1, ..none() }, Objective::Latency, 50);
    assert_eq!(learned.static_form().unwrap().rounding, Rounding::Learned);
    // Nothing that costs more was tried.
    assert!(outcome.trials.iter().all(|t| t.candidate.static_form().is_none_or(|f| !f.wide && f.aware_steps == 0)));
    // Wide values are slower than floats here: for size they are taken, for time they are not.
    let is_wide = |candidate: &Candidate| candidate.static_form().is_some_and(|form| form.wide);
    let (_, outcome) = found(Left { wide: 0.01, ..none() }, Objective::Size, 0);
    assert!(outcome.trials.iter().any(|t| is_wide(&t.candidate) && t.search.as_ref().unwrap().drop.high <= 0.01));
    assert!(outcome.trials.iter().all(|t| t.candidate.static_form().is_none_or(|f| f.float_units.is_empty())));
    let (fast, _) = found(Left { wide: 0.01, ..none() }, Objective::Latency, 0);
    assert!(!is_wide(&fast) && !fast.static_form().unwrap().float_units.is_empty());
    let (trained, _) = found(Left { aware: 0.1, ..none() }, Objective::Latency, 50);
    assert_eq!(trained.static_form().map(|f| (f.aware_steps, f.float_units.len())), Some((50, 0)));
}

#[test]
fn pruning_that_misses_the_limit_recovers_longer_and_only_where_that_may_help() {
    let left = |longer| Left { learned: 1.0, wide: 1.0, aware: 1.0, longer };
    let mut fake = Fake { pruning_harm: 0.03, left: left(0.1), ..Fake::new(&[1e-5; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    let pruning = chosen(&outcome).candidate.pruning.as_ref().unwrap();
    assert_eq!((pruning.ratio, pruning.recovery_steps), (0.5, 30));
    // A drop of many limits is not trained away.
    let mut fake = Fake { pruning_harm: 1.0, left: left(0.001), ..Fake::new(&[1e-5; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    assert!(chosen(&outcome).candidate.pruning.is_none());
}

#[test]
fn zeros_that_save_nothing_are_refused_with_the_reason() {
    let mut fake = Fake::new(&[1e-5; 10]);
    let outcome = search(&mut fake, &settings(Objective::Size, 0.01)).unwrap();
    let zeros = outcome.trials.iter().find(|t| t.name == "2:4 sparse").unwrap();
    assert!(zeros.refused.as_ref().unwrap().contains("zeros are stored as any number"));
    assert!(outcome.trials.iter().all(|t| !t.reason.is_empty()));
}

#[test]
fn units_that_need_not_have_gone_come_back() {
    // By divergence for its work the first unit seems worst, but its drop is nothing.
    struct Misleading(Fake);
    impl Workbench for Misleading {
        fn make(&mut self, c: &Candidate) -> Result<Made, Trouble> {
            self.0.make(c)
        }
        fn divergence(&mut self, c: &Candidate) -> Result<f64, Trouble> {
            self.0.divergence(c)
        }
        fn search_drop(&mut self, c: &Candidate, limit: f64) -> Result<Judgement, Trouble> {
            self.0.search_drop(c, limit)
        }
        fn holdout_drop(&mut self, c: &Candidate, limit: f64, alpha: f64) -> Result<Judgement, Trouble> {
            self.0.holdout_drop(c, limit, alpha)
        }
        fn speed(&mut self, c: &Candidate) -> Result<Speed, Trouble> {
            self.0.speed(c)
        }
        fn sensitivity(&mut self, form: &StaticForm) -> Result<Vec<UnitSensitivity>, Trouble> {
            let mut units = self.0.sensitivity(form)?;
            units[0].divergence = 1.0;
            Ok(units)
        }
        fn note(&mut self, _: &str) {}
    }
    let mut harm = [1e-5; 10];
    harm[5] = 0.05;
    let mut fake = Misleading(Fake { pruning_harm: 1.0, ..Fake::new(&harm) });
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    let form = chosen(&outcome).candidate.static_form().unwrap();
    assert_eq!(form.float_units, BTreeSet::from([unit(5)]));
    assert!(outcome.decisions.iter().any(|d| d.unit == unit(0) && d.form == "int8"));
}

#[test]
fn a_limit_that_nothing_meets_gives_the_original_and_says_by_how_much_the_nearest_misses() {
    let mut fake = Fake { pruning_harm: 1.0, ..Fake::new(&[0.05; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.001)).unwrap();
    assert_eq!(outcome.chosen, 0);
    let (at, miss) = outcome.missed.unwrap();
    let upper = outcome.trials[at].search.as_ref().unwrap().drop.high;
    assert!((miss - (upper - 0.001)).abs() < 1e-12 && miss > 0.0);
}

#[test]
fn a_slower_model_is_never_chosen_for_latency() {
    let mut fake = Fake { int8_time: 1.5, pruning_harm: 1.0, ..Fake::new(&[1e-5; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    assert_eq!(outcome.chosen, 0);
    // For size it may be slower.
    let mut fake = Fake { int8_time: 1.5, pruning_harm: 1.0, ..Fake::new(&[1e-5; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Size, 0.01)).unwrap();
    assert_eq!(chosen(&outcome).name, "int4 weights (blocks of 128)");
}

#[test]
fn what_the_holdout_refutes_is_not_chosen() {
    let mut fake = Fake { optimism: 0.02, ..Fake::new(&[1e-5; 10]) };
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    assert_eq!(outcome.chosen, 0);
    assert!(outcome.trials.iter().skip(1).any(|t| t.holdout.is_some()));
}

#[test]
fn whenever_the_time_ends_there_is_a_model() {
    let mut fake = Fake::new(&[1e-3; 10]);
    search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
    // What follows the holdout tells and decides nothing.
    let total = fake.asked.iter().rposition(|what| what.starts_with("holdout")).unwrap() + 1;
    for answers in 3..total {
        let mut fake = Fake { answers: Some(answers), ..Fake::new(&[1e-3; 10]) };
        let outcome = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap();
        assert!(outcome.is_cut_short, "{answers} of {total}");
        let trial = chosen(&outcome);
        assert!(trial.holdout.as_ref().unwrap().drop.high <= 0.01, "{answers}");
    }
    // Without even the original's figures there is nothing to say.
    for answers in 0..3 {
        let mut fake = Fake { answers: Some(answers), ..Fake::new(&[1e-3; 10]) };
        let error = search(&mut fake, &settings(Objective::Latency, 0.01)).unwrap_err();
        assert!(matches!(error, CompressError::TimeLimit), "{error}");
    }
}

#[test]
fn a_looser_limit_never_gives_a_slower_model() {
    for seed in 0..200 {
        let key = Key::new(21).child_index(seed);
        let draw = |i: u64| f64::from(key.uniform_f32(i));
        let mut trials: Vec<Trial> = Vec::new();
        for i in 0..12u64 {
            let judge = |j: u64| Fake::judgement(0.05 * draw(10 * i + j), 0.02 * draw(10 * i + j + 1));
            let ratio = 1.3 * draw(10 * i + 5);
            let interval = Interval { estimate: ratio, low: 0.9 * ratio, high: 1.1 * ratio };
            trials.push(Trial {
                candidate: Candidate::default(),
                name: String::new(),
                reason: String::new(),
                size_bytes: Some((1e5 * draw(10 * i + 6)) as u64),
                divergence: None,
                search: Some(judge(0)),
                holdout: (draw(10 * i + 7) < 0.7).then(|| judge(2)),
                speed: Some(Speed { latency_ratio: interval, latency_ns: interval, cost_ns: Some(interval) }),
                refused: (draw(10 * i + 8) < 0.2).then(String::new),
            });
        }
        trials[0].speed.as_mut().unwrap().latency_ratio = Interval::exactly(1.0);
        trials[0].refused = None;
        for objective in [Objective::Latency, Objective::Size, Objective::Cost] {
            let at = |limit: f64| trials[choose(&trials, objective, limit)].objective(objective).unwrap();
            let values: Vec<f64> = (0..60).map(|i| at(f64::from(i) * 0.001)).collect();
            assert!(values.is_sorted_by(|a, b| a >= b), "{objective:?} {seed}: {values:?}");
        }
    }
}

#[test]
fn no_trial_of_the_front_is_beaten_and_every_other_is() {
    let mut fake = Fake::new(&[1e-3, 1e-4, 2e-3, 5e-3, 1e-3, 1e-4]);
    let outcome = search(&mut fake, &settings(Objective::Latency, 0.005)).unwrap();
    let beats = |a: &Trial, b: &Trial| {
        let (a, b) = (a.point().unwrap(), b.point().unwrap());
        a.iter().zip(&b).all(|(x, y)| x <= y)
    };
    assert!(outcome.front.len() >= 3);
    for (i, trial) in outcome.trials.iter().enumerate().filter(|(_, t)| t.point().is_some()) {
        let is_beaten = outcome.front.iter().any(|f| *f != i && beats(&outcome.trials[*f], trial));
        assert_eq!(is_beaten, !outcome.front.contains(&i), "{}", trial.name);
    }
}

#[test]
fn the_same_answers_give_the_same_search() {
    let run = || {
        let mut fake = Fake::new(&[1e-3, 1e-4, 2e-3, 5e-3, 1e-3, 1e-4]);
        let outcome = search(&mut fake, &settings(Objective::Cost, 0.005)).unwrap();
        (serde_json::to_string(&outcome).unwrap(), fake.asked)
    };
    assert_eq!(run(), run());
}
