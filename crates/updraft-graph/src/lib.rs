//! The network in memory: operators, types, shapes, checker, text form, ONNX in and out.
