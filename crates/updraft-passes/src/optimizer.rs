//! Optimizers as nodes behind gradients: clipping by the global norm, weight decay by group, one update a parameter.

use updraft_graph::graph::UPDRAFT_DOMAIN;
use updraft_graph::op::OpError;
use updraft_graph::{Attributes, Graph, Tensor, ValueId, ValueType};

use crate::PassError;
use crate::training::{StateEntry, StateRole};

/// How parameters move against their gradients. Formulas and defaults are those of PyTorch's documentation; see
/// [`updraft_graph::op::optimizer`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimizer {
    /// Stochastic gradient descent.
    Sgd {
        /// Share of the last step that is kept, in [0, 1); 0 keeps none.
        momentum: f32,
        /// Looks ahead along the momentum, which must then be above 0.
        nesterov: bool,
    },
    /// Adam; weight decay is added to the gradient.
    Adam(AdamSettings),
    /// Adam with weight decay apart from the gradient.
    AdamW(AdamSettings),
}

/// Settings of Adam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamSettings {
    /// Decay of the mean of gradients, in [0, 1).
    pub beta1: f32,
    /// Decay of the mean of squared gradients, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
}

impl Default for AdamSettings {
    /// The values of the paper.
    fn default() -> AdamSettings {
        AdamSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// Which parameters decay, and how fast.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeightDecay {
    /// The decay of parameters with at least two axes longer than 1 that no rule names. Biases, norm scales and other
    /// vectors do not decay unless a rule says so.
    pub amount: f32,
    /// Patterns over parameter names with their decay; the first that fits decides. See [`matches`].
    pub rules: Vec<(String, f32)>,
}

impl WeightDecay {
    /// The decay of one parameter.
    pub fn of(&self, name: &str, shape: &[usize]) -> f32 {
        match self.rules.iter().find(|(pattern, _)| matches(pattern, name)) {
            Some((_, amount)) => *amount,
            None if shape.iter().filter(|n| **n > 1).count() < 2 => 0.0,
            None => self.amount,
        }
    }
}

/// Whether a name fits a pattern, in which `*` stands for any text and `?` for any one character.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // fits[j]: the pattern so far fits the first j characters of the name.
    let mut fits = vec![false; name.len() + 1];
    fits[0] = true;
    for p in pattern {
        let mut next = vec![false; name.len() + 1];
        for j in 0..=name.len() {
            next[j] = match p {
                '*' => fits[j] || j > 0 && next[j - 1],
                _ => j > 0 && fits[j - 1] && (p == '?' || p == name[j - 1]),
            };
        }
        fits = next;
    }
    fits[name.len()]
}

/// The scalars of a step that updates read.
pub(crate) struct StepInputs {
    pub(crate) learning_rate: ValueId,
    pub(crate) step: ValueId,
}

/// Adds the norm of all gradients, and the factor that brings it down to `norm_max`:
/// `min(1, norm_max / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` has it.
pub(crate) fn clip(graph: &mut Graph, gradients: &[ValueId], norm_max: f32) -> Result<(ValueId, ValueId), PassError> {
    if norm_max.is_nan() || norm_max <= 0.0 {
        let problem = format!("must be above 0, found {norm_max}");
        return Err(PassError::Option { option: "clip_norm", problem });
    }
    let norm = graph.own_op("GlobalNorm", gradients, [])?;
    let mut scalar = |value: f32| graph.add_constant("clip", Tensor::scalar(value));
    let (little, limit, one) = (scalar(1e-6), scalar(norm_max), scalar(1.0));
    let divisor = graph.op("Add", &[norm, little], [])?;
    let ratio = graph.op("Div", &[limit, divisor], [])?;
    let scale = graph.op("Min", &[one, ratio], [])?;
    Ok((norm, scale))
}

/// Adds the update of one parameter, and its moments as state; returns what the step keeps of it.
pub(crate) fn update(
    graph: &mut Graph,
    optimizer: Optimizer,
    parameter: (ValueId, &Tensor),
    gradient: ValueId,
    inputs: &StepInputs,
    gradient_scale: Option<ValueId>,
    weight_decay: f32,
) -> Result<Vec<StateEntry>, PassError> {
    let (value, initial) = parameter;
    let name = graph.value(value).name.clone();
    let moments: &[&str] = match optimizer {
        Optimizer::Sgd { momentum: 0.0, .. } => &[],
        Optimizer::Sgd { .. } => &["momentum"],
        Optimizer::Adam(_) | Optimizer::AdamW(_) => &["mean", "mean_square"],
    };
    let zeros = Tensor::zeros(initial.dtype(), initial.shape()).map_err(OpError::from)?;
    let mut state = vec![(name.clone(), initial.clone(), StateRole::Parameter)];
    let mut operands = vec![Some(value), Some(gradient)];
    for moment in moments {
        let moment = format!("{name}.{moment}");
        operands.push(Some(add_state(graph, &moment, zeros.clone())?));
        state.push((moment, zeros.clone(), StateRole::Moment));
    }
    let (op, attributes): (_, Attributes) = match optimizer {
        Optimizer::Sgd { momentum, nesterov } => {
            operands.resize(3, None);
            let nesterov = i64::from(nesterov);
            ("SgdUpdate", [("momentum", momentum.into()), ("nesterov", nesterov.into())].into())
        }
        Optimizer::Adam(settings) => ("AdamUpdate", adam_attributes(settings, false)),
        Optimizer::AdamW(settings) => ("AdamUpdate", adam_attributes(settings, true)),
    };
    let mut attributes = attributes;
    attributes.set("weight_decay", weight_decay);
    operands.push(Some(inputs.learning_rate));
    if op == "AdamUpdate" {
        operands.push(Some(inputs.step));
    }
    if gradient_scale.is_some() {
        operands.push(gradient_scale);
    }
    let updated = graph.op_n(UPDRAFT_DOMAIN, op, &operands, attributes, state.len())?;
    let keep = |((input, initial, role), output)| keep_state(graph, input, initial, role, output);
    state.into_iter().zip(updated).map(keep).collect()
}

/// Refuses settings outside their range before anything is built.
pub(crate) fn check(optimizer: Optimizer) -> Result<(), PassError> {
    let in_range = |option: &'static str, value: f32| {
        if (0.0..1.0).contains(&value) {
            return Ok(());
        }
        Err(PassError::Option { option, problem: format!("must be in [0, 1), found {value}") })
    };
    match optimizer {
        Optimizer::Sgd { momentum, nesterov } => {
            in_range("optimizer.momentum", momentum)?;
            if nesterov && momentum == 0.0 {
                let problem = "must be above 0 for Nesterov's form".to_owned();
                return Err(PassError::Option { option: "optimizer.momentum", problem });
            }
        }
        Optimizer::Adam(settings) | Optimizer::AdamW(settings) => {
            in_range("optimizer.beta1", settings.beta1)?;
            in_range("optimizer.beta2", settings.beta2)?;
            if settings.epsilon.is_nan() || settings.epsilon < 0.0 {
                let problem = format!("must not be negative, found {}", settings.epsilon);
                return Err(PassError::Option { option: "optimizer.epsilon", problem });
            }
        }
    }
    Ok(())
}

fn adam_attributes(settings: AdamSettings, decoupled: bool) -> Attributes {
    [
        ("beta1", settings.beta1.into()),
        ("beta2", settings.beta2.into()),
        ("epsilon", settings.epsilon.into()),
        ("decoupled", i64::from(decoupled).into()),
    ]
    .into()
}

/// Adds a state input that starts as `initial`.
fn add_state(graph: &mut Graph, name: &str, initial: Tensor) -> Result<ValueId, PassError> {
    let id = graph.add_input(name, ValueType::of(&initial))?;
    graph.set_constant(id, Some(initial));
    Ok(id)
}

/// Makes `output` the next value of the state input `input`.
pub(crate) fn keep_state(
    graph: &mut Graph,
    input: String,
    initial: Tensor,
    role: StateRole,
    output: ValueId,
) -> Result<StateEntry, PassError> {
    let next = format!("{input}.next");
    graph.rename(output, &next)?;
    graph.push_output(output);
    Ok(StateEntry { input, output: next, initial, role })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let rows = [
            ("*.bias", "fc.bias", true),
            ("*.bias", "fc.bias.x", false),
            ("layer?.weight", "layer1.weight", true),
            ("layer?.weight", "layer10.weight", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("fc", "fc", true),
        ];
        for (pattern, name, expected) in rows {
            assert_eq!(matches(pattern, name), expected, "{pattern} against {name}");
        }
    }

    #[test]
    fn vectors_do_not_decay_unless_a_rule_says_so() {
        let decay = WeightDecay { amount: 0.1, rules: vec![("norm*".into(), 0.3), ("*.weight".into(), 0.2)] };
        assert_eq!(decay.of("fc.bias", &[10]), 0.0);
        assert_eq!(decay.of("fc.scale", &[1, 10, 1, 1]), 0.0);
        assert_eq!(decay.of("fc.kernel", &[3, 10]), 0.1);
        assert_eq!(decay.of("norm.weight", &[10]), 0.3);
        assert_eq!(decay.of("fc.weight", &[10, 3]), 0.2);
    }
}
