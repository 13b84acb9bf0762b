//! Learning rate as a pure function of the step: nothing is remembered, so a resumed run needs no state of its own.

use std::f64::consts::PI;

/// A learning rate over the steps of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The rate at its highest.
    pub peak: f64,
    /// Steps over which the rate first rises from `peak / (warmup_steps + 1)` to `peak` along a line.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    pub shape: Shape,
}

/// How the rate goes on after the warm-up. Step 0 is the first step after it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// Stays at the peak.
    Constant,
    /// Is multiplied by `factor` every `every_steps` steps (`torch.optim.lr_scheduler.StepLR`).
    Step {
        /// Steps between two drops.
        every_steps: u64,
        /// Multiplies the rate at each drop.
        factor: f64,
    },
    /// Half a cosine from the peak to `floor`, reached at step `total_steps` of the whole run, warm-up included, and
    /// kept from there on (Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", equation 5).
    Cosine {
        /// Steps of the whole run.
        total_steps: u64,
        /// The rate at the end.
        floor: f64,
    },
    /// Up from `peak / start_divisor` to the peak over `rise` of the steps and down to
    /// `peak / start_divisor / end_divisor` at the last one, both along half a cosine (Smith and Topin,
    /// "Super-convergence"; the constants' meaning is that of `torch.optim.lr_scheduler.OneCycleLR`).
    OneCycle {
        /// Steps of the whole run, warm-up included.
        total_steps: u64,
        /// Share of the steps that rise, in (0, 1).
        rise: f64,
        /// The peak over the first rate.
        start_divisor: f64,
        /// The first rate over the last.
        end_divisor: f64,
    },
}

impl Schedule {
    /// The learning rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let since = step - self.warmup_steps;
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Step { every_steps, factor } => self.peak * factor.powf((since / every_steps.max(1)) as f64),
            Shape::Cosine { total_steps, floor } => {
                let steps = total_steps.saturating_sub(self.warmup_steps);
                half_cosine(self.peak, floor, progress(since as f64, steps as f64))
            }
            Shape::OneCycle { total_steps, rise, start_divisor, end_divisor } => {
                let last = total_steps.saturating_sub(self.warmup_steps) as f64 - 1.0;
                // The rate reaches the peak at the end of the `rise`-th step, as in PyTorch.
                let top = (rise * (last + 1.0) - 1.0).max(0.0);
                let (start, since) = (self.peak / start_divisor, since as f64);
                if since < top {
                    half_cosine(start, self.peak, since / top)
                } else {
                    half_cosine(self.peak, start / end_divisor, progress(since - top, last - top))
                }
            }
        }
    }
}

/// How much of `length` is behind, at most 1.
fn progress(behind: f64, length: f64) -> f64 {
    if behind >= length { 1.0 } else { behind / length }
}

fn half_cosine(from: f64, to: f64, progress: f64) -> f64 {
    to + (from - to) * (1.0 + (PI * progress).cos()) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(warmup_steps: u64, shape: Shape, expected: &[(u64, f64)]) {
        let schedule = Schedule { peak: 1.0, warmup_steps, shape };
        for (step, rate) in expected {
            let found = schedule.at(*step);
            assert!((found - rate).abs() < 1e-12, "{shape:?} at {step}: {found} against {rate}");
        }
    }

    #[test]
    fn warm_up_rises_along_a_line_and_ends_at_the_peak() {
        check(4, Shape::Constant, &[(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (1000, 1.0)]);
    }

    #[test]
    fn step_drops_at_each_multiple() {
        check(0, Shape::Step { every_steps: 3, factor: 0.1 }, &[(2, 1.0), (3, 0.1), (6, 0.01)]);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle_and_stays_at_its_floor() {
        check(10, Shape::Cosine { total_steps: 30, floor: 0.5 }, &[(10, 1.0), (20, 0.75), (30, 0.5), (99, 0.5)]);
    }

    /// Expected rates from `OneCycleLR(max_lr=1, total_steps=10)` of PyTorch 2.15.
    #[test]
    fn one_cycle_matches_pytorch() {
        let shape = Shape::OneCycle { total_steps: 10, rise: 0.3, start_divisor: 25.0, end_divisor: 1e4 };
        let expected = [
            (0, 0.04),
            (1, 0.52),
            (2, 1.0),
            (3, 0.9504846320134737),
            (5, 0.6112620219362893),
            (8, 0.049519367986526286),
            (9, 4e-6),
        ];
        let schedule = Schedule { peak: 1.0, warmup_steps: 0, shape };
        for (step, rate) in expected {
            assert!((schedule.at(step) - rate).abs() < 1e-12, "step {step}: {} against {rate}", schedule.at(step));
        }
        assert_eq!(schedule.at(10_000), schedule.at(9));
    }
}
