//! Memory: after the first steps, a step allocates nothing but short lists.
#![expect(unsafe_code, reason = "an allocator that counts")]

#[expect(dead_code, reason = "other tests use the rest")]
mod reference;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Result, Tensor};
use layers::{Mode, Modes, Precision, Sgd};
use reference::{fill, narrow_resnet, noise};

/// The system's allocator, counting bytes and the largest request.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes and the largest request of each of five steps on one thread.
fn steps(precision: Precision) -> Result<Vec<(usize, usize)>> {
    let case = narrow_resnet(24, 20);
    let network = case.network(None)?.with_precision(precision);
    let (mut parameters, mut gradients) = (network.parameters(), network.gradients());
    fill(&mut parameters, 1)?;
    let (mut statistics, mut momenta) = (network.statistics(), network.momenta());
    let modes = Modes::all(&network, Mode::Batch);
    let x = case.tensor(32, &noise(3, case.input_len(32)))?;
    let weights = noise(4, 32 * network.output_width());
    let gradient = Tensor::from_slice(&weights, (32, network.output_width()), x.device())?;
    let mut tape = network.tape();
    let sgd = Sgd { learning_rate: 0.01, momentum: 0.9, weight_decay: 5e-4 };
    (0..5)
        .map(|_| {
            BYTES.store(0, Ordering::Relaxed);
            LARGEST.store(0, Ordering::Relaxed);
            network.forward(&parameters, &mut statistics, &x, &modes, None)?;
            network.forward(&parameters, &mut statistics, &x, &modes, Some(&mut tape))?;
            network.backward(&parameters, &mut tape, &gradient, &mut gradients, false)?;
            parameters.sgd(&gradients, &mut momenta, sgd)?;
            gradients.zero();
            Ok((BYTES.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed)))
        })
        .collect()
}

#[test]
fn a_step_after_the_first_ones_allocates_no_memory_for_values() -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    for precision in [Precision::F32, Precision::Bf16] {
        let steps = pool.install(|| steps(precision))?;
        assert!(steps[0].0 > 3 << 20, "{precision:?}: {steps:?}");
        for (bytes, largest) in &steps[2..] {
            // The smallest map takes 120 KiB. The rest are lists: shapes, means and variances of channels,
            // taps of pixels.
            assert!(*bytes < 256 << 10 && *largest < 10 << 10, "{precision:?}: {steps:?}");
        }
    }
    Ok(())
}
