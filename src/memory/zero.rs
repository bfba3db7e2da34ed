//! Finding pages of zeros.
//!
//! The guest may write while we look; the answer then is that of some moment, which is enough: the dirty log knows of
//! the write. Loads go through raw pointers, because a `&[u8]` would promise that the bytes stand still.

use std::arch::x86_64::{
    _mm_cmpeq_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128, _mm256_loadu_si256,
    _mm256_or_si256, _mm256_testz_si256,
};

/// Bytes that each step of both vector loops looks at before it decides.
const STEP_BYTES: usize = 128;

/// Whether `length` bytes from `start` are all zero.
///
/// # Safety
/// The range must be readable for the length of the call.
pub(super) unsafe fn is_zero(start: *const u8, length: usize) -> bool {
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the range is the caller's promise.
        unsafe { is_zero_avx2(start, length) }
    } else {
        // SAFETY: SSE2 is part of x86-64; the range is the caller's promise.
        unsafe { is_zero_sse2(start, length) }
    }
}

/// # Safety
/// As [`is_zero`], and the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(start: *const u8, length: usize) -> bool {
    let mut offset = 0;
    while offset + STEP_BYTES <= length {
        // SAFETY: the four loads of 32 bytes end at `offset + STEP_BYTES`, which is within the range.
        let any = unsafe {
            let at = start.add(offset).cast();
            let first = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)));
            let second = _mm256_or_si256(_mm256_loadu_si256(at.add(2)), _mm256_loadu_si256(at.add(3)));
            _mm256_or_si256(first, second)
        };
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
        offset += STEP_BYTES;
    }
    // SAFETY: `offset <= length`.
    unsafe { is_zero_bytes(start.add(offset), length - offset) }
}

/// # Safety
/// As [`is_zero`].
unsafe fn is_zero_sse2(start: *const u8, length: usize) -> bool {
    let mut offset = 0;
    while offset + STEP_BYTES <= length {
        // SAFETY: the eight loads of 16 bytes end at `offset + STEP_BYTES`, which is within the range.
        let any = unsafe {
            let at = start.add(offset).cast();
            (1..8).fold(_mm_loadu_si128(at), |any, n| _mm_or_si128(any, _mm_loadu_si128(at.add(n))))
        };
        // SAFETY: register arithmetic of SSE2, which x86-64 has.
        let equal = unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) };
        if equal != 0xffff {
            return false;
        }
        offset += STEP_BYTES;
    }
    // SAFETY: `offset <= length`.
    unsafe { is_zero_bytes(start.add(offset), length - offset) }
}

/// # Safety
/// As [`is_zero`].
unsafe fn is_zero_bytes(start: *const u8, length: usize) -> bool {
    // SAFETY: every offset is within the range.
    (0..length).all(|offset| unsafe { start.add(offset).read_volatile() } == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Check = unsafe fn(*const u8, usize) -> bool;

    fn checks() -> Vec<(&'static str, Check)> {
        let mut checks: Vec<(&'static str, Check)> =
            vec![("dispatch", is_zero), ("sse2", is_zero_sse2), ("bytes", is_zero_bytes)];
        if std::is_x86_feature_detected!("avx2") {
            checks.push(("avx2", |start, length| {
                // SAFETY: detected above; the range is the caller's promise.
                unsafe { is_zero_avx2(start, length) }
            }));
        }
        checks
    }

    /// One set byte at every place of a page, and in ranges that begin and end anywhere: each way agrees with the
    /// definition.
    #[test]
    fn every_way_agrees_with_the_definition() {
        let mut page = vec![0u8; 4096];
        for (name, check) in checks() {
            for place in 0..page.len() {
                page[place] = 0x80;
                for range in [0..4096, place..4096, 0..place, 1..4095, 3..260] {
                    let expected = page[range.clone()].iter().all(|&byte| byte == 0);
                    // SAFETY: the slice is readable.
                    let found = unsafe { check(page[range.clone()].as_ptr(), range.len()) };
                    assert_eq!(found, expected, "{name}: byte {place} in {range:?}");
                }
                page[place] = 0;
            }
        }
    }
}
