#![no_main]

// A decoder that panics is contained by the reader: only what escapes it is a finding, so the hook that aborts has to go.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| updraft_fuzz::shards::parquet_read(bytes)
);
