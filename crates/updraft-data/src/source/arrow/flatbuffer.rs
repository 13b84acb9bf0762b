//! FlatBuffers, as far as Arrow's metadata needs them: tables with optional fields, vectors, strings.
//!
//! Every position is a claim of the file, so every access is checked; nothing is copied and nothing recurses.

/// A table: a position from which a list of field offsets is found.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn cut() -> String {
    "its metadata points outside of itself".into()
}

fn array<const BYTES: usize>(bytes: &[u8], at: usize) -> Result<[u8; BYTES], String> {
    bytes.get(at..).and_then(|b| b.first_chunk::<BYTES>()).copied().ok_or_else(cut)
}

/// The position that a forward offset at `at` leads to.
fn follow(bytes: &[u8], at: usize) -> Result<usize, String> {
    let offset = u32::from_le_bytes(array(bytes, at)?) as usize;
    at.checked_add(offset).filter(|to| *to < bytes.len()).ok_or_else(cut)
}

impl<'a> Table<'a> {
    pub(super) fn root(bytes: &'a [u8]) -> Result<Table<'a>, String> {
        Ok(Table { bytes, at: follow(bytes, 0)? })
    }

    /// Where a field is, `None` where it has its default.
    fn field(&self, number: usize) -> Result<Option<usize>, String> {
        let back = i32::from_le_bytes(array(self.bytes, self.at)?);
        let list =
            i64::try_from(self.at).ok().and_then(|at| usize::try_from(at - i64::from(back)).ok()).ok_or_else(cut)?;
        let length = usize::from(u16::from_le_bytes(array(self.bytes, list)?));
        let entry = 4 + 2 * number;
        if entry + 2 > length {
            return Ok(None);
        }
        let offset = usize::from(u16::from_le_bytes(array(self.bytes, list + entry)?));
        Ok((offset != 0).then_some(self.at + offset))
    }

    fn number<const BYTES: usize>(&self, number: usize) -> Result<Option<[u8; BYTES]>, String> {
        self.field(number)?.map(|at| array(self.bytes, at)).transpose()
    }

    pub(super) fn u8(&self, number: usize) -> Result<u8, String> {
        Ok(self.number::<1>(number)?.map_or(0, |b| b[0]))
    }

    pub(super) fn i16(&self, number: usize) -> Result<i16, String> {
        Ok(self.number(number)?.map_or(0, i16::from_le_bytes))
    }

    pub(super) fn i32(&self, number: usize) -> Result<i32, String> {
        Ok(self.number(number)?.map_or(0, i32::from_le_bytes))
    }

    pub(super) fn i64(&self, number: usize) -> Result<i64, String> {
        Ok(self.number(number)?.map_or(0, i64::from_le_bytes))
    }

    pub(super) fn table(&self, number: usize) -> Result<Option<Table<'a>>, String> {
        let Some(at) = self.field(number)? else { return Ok(None) };
        Ok(Some(Table { bytes: self.bytes, at: follow(self.bytes, at)? }))
    }

    pub(super) fn text(&self, number: usize) -> Result<&'a str, String> {
        let Some(at) = self.field(number)? else { return Ok("") };
        let bytes = self.elements(at, 1)?;
        std::str::from_utf8(bytes).map_err(|_| "a name is not UTF-8".into())
    }

    /// The bytes of the elements of a vector whose offset is at `at`.
    fn elements(&self, at: usize, element_bytes: usize) -> Result<&'a [u8], String> {
        let start = follow(self.bytes, at)?;
        let length = u32::from_le_bytes(array(self.bytes, start)?) as usize;
        let bytes = length.checked_mul(element_bytes).ok_or_else(cut)?;
        self.bytes.get(start + 4..).and_then(|rest| rest.get(..bytes)).ok_or_else(cut)
    }

    /// A vector of structs of a size.
    pub(super) fn structs(&self, number: usize, struct_bytes: usize) -> Result<&'a [u8], String> {
        match self.field(number)? {
            Some(at) => self.elements(at, struct_bytes),
            None => Ok(&[]),
        }
    }

    /// A vector of tables, which are taken from those that may still be looked at: tables may share others, so that the
    /// bytes of a file do not bound how many there are.
    pub(super) fn tables(&self, number: usize, left: &mut usize) -> Result<Vec<Table<'a>>, String> {
        let Some(at) = self.field(number)? else { return Ok(Vec::new()) };
        let start = follow(self.bytes, at)? + 4;
        let count = self.elements(at, 4)?.len() / 4;
        *left = left.checked_sub(count).ok_or("its metadata lists too many fields")?;
        let table = |index: usize| Ok(Table { bytes: self.bytes, at: follow(self.bytes, start + 4 * index)? });
        (0..count).map(table).collect()
    }
}

/// The `at`-th 64-bit number of a vector of structs.
pub(super) fn i64_at(structs: &[u8], at: usize) -> Result<i64, String> {
    array(structs, 8 * at).map(i64::from_le_bytes)
}
