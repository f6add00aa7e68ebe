//! Huge pages for large memory, where the system has them.
#![cfg_attr(
    all(target_os = "linux", not(miri)),
    expect(unsafe_code, reason = "a system call on memory that is given by its address")
)]

/// Bytes of a huge page, on every processor that matters here.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// `len` zeros, on huge pages if possible.
///
/// A batch of photographs takes tens of megabytes. With pages of 4 KB, clearing and mapping them at
/// first use takes half as long as the work on them. Where huge pages are not available, these are
/// ordinary zeros.
pub fn zeros(len: usize) -> Vec<f32> {
    let mut values = vec![0f32; len];
    advise_huge_pages(values.as_mut_ptr().cast(), size_of_val(&values[..]));
    values
}

/// Asks the system for huge pages, for those that lie completely inside this memory. A refusal changes
/// nothing.
pub(crate) fn advise_huge_pages(start: *mut u8, bytes: usize) {
    let first = (start as usize).next_multiple_of(HUGE_PAGE);
    let length = (start as usize + bytes).saturating_sub(first) / HUGE_PAGE * HUGE_PAGE;
    if length == 0 {
        return;
    }
    #[cfg(all(target_os = "linux", not(miri)))]
    // SAFETY: the range lies inside memory of the caller, and this advice changes no contents.
    unsafe {
        libc::madvise(first as *mut libc::c_void, length, libc::MADV_HUGEPAGE);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn zeros_are_zeros_on_any_pages() {
        for len in [0, 5, 3 << 20] {
            let mut values = super::zeros(len);
            assert!(values.len() == len && values.iter().all(|&value| value == 0.));
            values.iter_mut().for_each(|value| *value = 1.);
            assert_eq!(values.iter().sum::<f32>(), len as f32);
        }
    }
}
