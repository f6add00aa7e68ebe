//! Large runs of numbers from pages of two megabytes, where the system has them.

/// `len` zeros.
///
/// A batch of photographs is tens of megabytes that the system clears, and maps, when they are first
/// written: with pages of 4 KB that takes as long as half of the work put into them. Where nothing
/// comes of the wish for larger ones, these are ordinary zeros.
pub fn zeros(len: usize) -> Vec<f32> {
    #[cfg_attr(not(target_os = "linux"), expect(unused_mut, reason = "nothing is asked for"))]
    let mut values = vec![0f32; len];
    #[cfg(target_os = "linux")]
    linux::ask_for_large_pages(&mut values);
    values
}

#[cfg(target_os = "linux")]
mod linux {
    #![expect(unsafe_code, reason = "a system call on memory that is named by its address")]

    /// Bytes of a large page, on every processor that matters here.
    const LARGE: usize = 2 << 20;

    /// For the large pages that lie wholly inside.
    pub(super) fn ask_for_large_pages(values: &mut [f32]) {
        let start = values.as_mut_ptr() as usize;
        let (first, end) = (start.next_multiple_of(LARGE), start + size_of_val(values));
        let length = end.saturating_sub(first) / LARGE * LARGE;
        if length > 0 {
            // SAFETY: the range lies inside `values`, and this advice changes no byte of it. Refused,
            // it does nothing.
            unsafe { libc::madvise(first as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn zeros_are_zeros_whatever_the_pages() {
        for len in [0, 5, 3 << 20] {
            let mut values = super::zeros(len);
            assert!(values.len() == len && values.iter().all(|&value| value == 0.));
            values.iter_mut().for_each(|value| *value = 1.);
            assert_eq!(values.iter().sum::<f32>(), len as f32);
        }
    }
}
