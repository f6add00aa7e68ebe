//! Times the three products of a ResNet-18's convolutions on 32 × 32 pictures, layer by layer.
//!
//! `cargo run --example convolutions -p kernels [-- f32|bf16 [batch]]`; `ASSORT_KERNEL` chooses the
//! kernels and `RAYON_NUM_THREADS` the threads. Best of several repetitions; with one thread on Linux
//! in time of its processor, which what else runs on the machine troubles less.
#![cfg_attr(target_os = "linux", expect(unsafe_code, reason = "the clock of a thread"))]

use std::time::{Duration, Instant};

use kernels::convolution::{self, Finish, Geometry};
use kernels::{Buffer, Pool, Precision, Shape, Variant};

fn main() -> Result<(), String> {
    let variant = Variant::selected()?;
    let batch = std::env::args().nth(2).and_then(|batch| batch.parse().ok()).unwrap_or(64);
    for precision in [Precision::F32, Precision::Bf16] {
        let name = if precision == Precision::F32 { "f32" } else { "bf16" };
        if std::env::args().nth(1).is_some_and(|only| only != name) {
            continue;
        }
        println!("{variant} kernels, {} threads, {name}", rayon::current_num_threads());
        let mut totals = [0.; 3];
        for (count, from, to, side, kernel, stride) in [
            (1, 3, 64, 32, 3, 1),
            (4, 64, 64, 32, 3, 1),
            (1, 64, 128, 32, 3, 2),
            (3, 128, 128, 16, 3, 1),
            (1, 128, 256, 16, 3, 2),
            (3, 256, 256, 8, 3, 1),
            (1, 256, 512, 8, 3, 2),
            (3, 512, 512, 4, 3, 1),
            (1, 64, 128, 32, 1, 2),
        ] {
            let input = Shape::new(batch, side, side, from);
            let Some(g) = Geometry::new(input, to, kernel, stride, kernel / 2) else { continue };
            let times = layer(variant, precision, &g);
            for (total, time) in totals.iter_mut().zip(times) {
                *total += f64::from(count) * time;
            }
            let flops = 2. * (g.output.count() * g.weights_len()) as f64;
            let show = |time: f64| format!("{:7.2} ms {:4.0} GF/s", 1e3 * time, flops / time / 1e9);
            println!(
                "{count} x {from:3} -> {to:3} @{side:2} {kernel}x{kernel}/{stride}: forward {}  dX {}  dW {}",
                show(times[0]),
                show(times[1]),
                show(times[2])
            );
        }
        let [forward, input, weight] = totals.map(|total| 1e3 * total);
        println!("all: forward {forward:.1} ms  dX {input:.1} ms  dW {weight:.1} ms");
    }
    Ok(())
}

fn best(repetitions: usize, mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repetitions {
        let (start, processor) = (Instant::now(), processor_time());
        run();
        let time = match (rayon::current_num_threads(), processor_time().zip(processor)) {
            (1, Some((end, start))) => end - start,
            _ => start.elapsed(),
        };
        best = best.min(time.as_secs_f64());
    }
    best
}

/// What this thread has had of a processor.
fn processor_time() -> Option<Duration> {
    #[cfg(target_os = "linux")]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is of the type that the call writes.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        (failed == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608. - 1.
    };
    (0..len).map(|_| next()).collect()
}

/// Seconds of the forward pass, of the input gradient and of the weight gradient.
fn layer(variant: Variant, precision: Precision, g: &Geometry) -> [f64; 3] {
    let value = |shape: Shape| {
        let mut value = Buffer::zeros_of(precision, shape.len());
        shape.pack(&noise(shape.count() * shape.channels), &mut value);
        value
    };
    let (x, dy, mut y, mut dx) = (value(g.input), value(g.output), value(g.output), value(g.input));
    let weights = noise(g.weights_len());
    let mut packed = Buffer::zeros_of(precision, g.packed_len(variant, precision));
    let pool = Pool::new();
    let mut dw = vec![0.; g.weights_len()];
    convolution::pack_forward(variant, g, &weights, &mut packed);
    let forward =
        best(8, || convolution::forward(variant, g, &x, &packed, Finish::default(), &mut y, None));
    convolution::pack_backward(variant, g, &weights, &mut packed);
    let input = best(8, || convolution::input_gradient(variant, g, &dy, &packed, &mut dx, false));
    let weight = best(8, || convolution::weight_gradient(variant, g, &x, &dy, &pool, &mut dw));
    [forward, input, weight]
}
