//! Bytes aligned to a cache line, so that typed views of them are always aligned and vector loads never split.

const LINE_BYTES: usize = 64;

/// One cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// A fixed number of aligned bytes.
#[derive(Clone)]
pub(super) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    /// `len` zero bytes; `None` where the allocator cannot give them.
    pub(super) fn zeroed(len: usize) -> Option<Buffer> {
        let count = len.div_ceil(LINE_BYTES);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).ok()?;
        lines.resize(count, Line([0; LINE_BYTES]));
        Some(Buffer { lines, len })
    }

    pub(super) fn from_slice(bytes: &[u8]) -> Buffer {
        let mut lines = vec![Line([0; LINE_BYTES]); bytes.len().div_ceil(LINE_BYTES)];
        bytemuck::cast_slice_mut::<Line, u8>(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Buffer { lines, len: bytes.len() }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Buffer) -> bool {
        self.as_slice() == other.as_slice()
    }
}
