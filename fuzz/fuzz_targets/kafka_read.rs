#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| updraft_fuzz::streams::kafka_read(bytes));
