//! Runs the sources of the kernels as C, block after block, and compares them with the CPU kernels and with
//! plain sums.
//!
//! This only needs the C compiler that Rust links with. It cannot test what a GPU adds: the launch, and the
//! synchronisation of the threads of a block.

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::ptr;

use half::bf16;

use super::arguments::{Extent, THREADS, adam_factors, blocks_of};
use crate::flat::{self, Adam, Sgd};

/// A source compiled as C, whose kernels compute one block at a time.
struct Compiled {
    library: *mut c_void,
    block: [*mut u32; 2],
}

impl Compiled {
    /// Compiles a file in `cuda`. Every instance has its own memory, since shared memory is static in C.
    fn of(source: &str, options: &[&str]) -> Compiled {
        let folder = tempfile::tempdir().expect("a folder");
        let library = folder.path().join("kernels.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda").join(source);
        let cc = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let output = Command::new(cc)
            .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"])
            .args(options)
            .args(["-x", "c"])
            .arg(source)
            .args(["-lm", "-o"])
            .arg(&library)
            .output()
            .expect("a C compiler");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = CString::new(library.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: a library compiled above, without constructors.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "the library loads");
        let mut compiled = Compiled { library, block: [ptr::null_mut(); 2] };
        compiled.block = ["block_x", "block_y"].map(|name| compiled.symbol(name).cast());
        // SAFETY: `grid.h` declares it so.
        assert_eq!(unsafe { *compiled.symbol("threads").cast::<u32>() }, THREADS);
        compiled
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let name_of_c = CString::new(name).expect("no NUL");
        // SAFETY: the library is open, the name ends with NUL.
        let symbol = unsafe { libc::dlsym(self.library, name_of_c.as_ptr()) };
        assert!(!symbol.is_null(), "no `{name}`");
        symbol
    }

    /// Calls `block` for every block of the grid.
    fn each_block(&self, [x, y]: [u32; 2], mut block: impl FnMut()) {
        for at_y in 0..y {
            for at_x in 0..x {
                // SAFETY: variables of the library that nothing else accesses.
                unsafe { (*self.block[0], *self.block[1]) = (at_x, at_y) };
                block();
            }
        }
    }
}

impl Drop for Compiled {
    fn drop(&mut self) {
        // SAFETY: opened in `of`, and its functions do not outlive a test.
        unsafe { libc::dlclose(self.library) };
    }
}

/// A kernel by its name and the types of its arguments.
macro_rules! kernel {
    ($compiled:expr, $name:literal, $($type:ty),+) => {{
        // SAFETY: the types are those of the source, only pointers and numbers.
        let kernel = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),+)>(
                $compiled.symbol($name),
            )
        };
        kernel
    }};
}

/// A type of the numbers in values.
trait Stored: Copy + PartialEq {
    const OPTIONS: &'static [&'static str];
    /// The relative rounding error.
    const ROUNDING: f64;
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
}

impl Stored for f32 {
    const OPTIONS: &'static [&'static str] = &[];
    const ROUNDING: f64 = 0.;
    fn of(x: f64) -> f32 {
        x as f32
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Stored for bf16 {
    const OPTIONS: &'static [&'static str] = &["-DBF16"];
    const ROUNDING: f64 = 1. / 256.;
    fn of(x: f64) -> bf16 {
        bf16::from_f64(x)
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

/// Numbers followed by guard numbers that no kernel may touch: they are huge, so that reading one shows in a
/// result, and different in each buffer, so that an update would change them.
struct Guarded<T> {
    numbers: Vec<T>,
    len: usize,
    guard: T,
}

const GUARD: usize = 64;

impl<T: Stored> Guarded<T> {
    fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut numbers: Vec<T> = values.into_iter().map(T::of).collect();
        let len = numbers.len();
        let guard = T::of(1e30 * (2. + numbers[0].wide()));
        numbers.extend([guard; GUARD]);
        Guarded { numbers, len, guard }
    }

    /// A buffer of NaN, to be written.
    fn unwritten(len: usize) -> Self {
        Guarded::new(vec![f64::NAN; len]).guarded_by(T::of(1e30))
    }

    fn guarded_by(mut self, guard: T) -> Self {
        self.numbers[self.len..].fill(guard);
        Guarded { guard, ..self }
    }

    fn pointer(&mut self) -> *mut T {
        self.numbers.as_mut_ptr()
    }

    /// The numbers, after a check that nothing was written beyond them.
    fn values(&self) -> Vec<f64> {
        assert!(self.numbers[self.len..].iter().all(|x| *x == self.guard), "beyond the end");
        self.numbers[..self.len].iter().map(|x| x.wide()).collect()
    }
}

fn noise(len: usize, salt: u64) -> impl Iterator<Item = f64> {
    (0..len as u64).map(move |at| {
        let mixed =
            (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD1B5_4A32_D192_ED03);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed >> 40) as f64 / (1u64 << 23) as f64 - 1.
    })
}

#[track_caller]
fn near(got: &[f64], want: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got - want).abs();
        assert!(off <= relative * want.abs() + absolute, "{at}: got {got}, want {want}");
    }
}

fn as_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Lengths around the size of a block.
const LENGTHS: [usize; 5] = [1, 255, 256, 257, 1003];

#[test]
fn updates_are_those_of_the_cpu() {
    let compiled = Compiled::of("flat.cu", &[]);
    let (sgd, adam) = (
        Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 5e-4 },
        Adam { learning_rate: 0.01, beta_1: 0.9, beta_2: 0.99, epsilon: 1e-6, weight_decay: 0.02 },
    );
    for len in LENGTHS {
        let buffer = |salt| Guarded::<f32>::new(noise(len, salt));
        let plain = |salt| noise(len, salt).map(|x| x as f32).collect::<Vec<f32>>();
        let squares = |salt| noise(len, salt).map(|x| x * x);
        let (blocks, count) = (blocks_of(len), len as u64);

        let (mut p, mut g, mut b) = (buffer(1), buffer(2), buffer(3));
        let step = kernel!(compiled, "sgd", *mut f32, *const f32, *mut f32, u64, f32, f32, f32);
        let (rate, momentum, decay) = (0.1, 0.9, 5e-4);
        compiled.each_block(blocks, || {
            // SAFETY: buffers of `len` numbers.
            unsafe { step(p.pointer(), g.pointer(), b.pointer(), count, rate, momentum, decay) }
        });
        let (mut want, mut momenta) = (plain(1), plain(3));
        flat::sgd(&mut want, &plain(2), &mut momenta, sgd);
        near(&p.values(), &as_f64(&want), 1e-6, 1e-7);
        near(&b.values(), &as_f64(&momenta), 1e-6, 1e-7);

        let (mut p, mut m, mut v) = (buffer(1), buffer(3), Guarded::<f32>::new(squares(4)));
        let step = kernel!(
            compiled,
            "adam",
            *mut f32,
            *const f32,
            *mut f32,
            *mut f32,
            u64,
            f32,
            f32,
            f32,
            f32,
            f32,
            f32,
            f32,
            f32
        );
        let [rate, root, beta_1, complement_1, beta_2, complement_2, epsilon, decay] =
            adam_factors(3, adam);
        compiled.each_block(blocks, || {
            let (p, g, m, v) = (p.pointer(), g.pointer(), m.pointer(), v.pointer());
            // SAFETY: buffers of `len` numbers.
            unsafe {
                step(
                    p,
                    g,
                    m,
                    v,
                    count,
                    rate,
                    root,
                    beta_1,
                    complement_1,
                    beta_2,
                    complement_2,
                    epsilon,
                    decay,
                );
            }
        });
        let (mut want, mut first) = (plain(1), plain(3));
        let mut second: Vec<f32> = squares(4).map(|x| x as f32).collect();
        flat::adam(&mut want, &plain(2), &mut first, &mut second, 3, adam);
        near(&p.values(), &as_f64(&want), 1e-6, 1e-7);
        near(&m.values(), &as_f64(&first), 1e-6, 1e-7);
        near(&v.values(), &as_f64(&second), 1e-6, 1e-7);

        let (mut target, mut online) = (buffer(5), buffer(6));
        let step = kernel!(compiled, "follow", *mut f32, *const f32, u64, f32);
        compiled.each_block(blocks, || {
            // SAFETY: buffers of `len` numbers.
            unsafe { step(target.pointer(), online.pointer(), count, (1. - 0.97f64) as f32) }
        });
        let mut want = plain(5);
        flat::follow(&mut want, &plain(6), 0.97);
        near(&target.values(), &as_f64(&want), 1e-6, 1e-7);
        assert_eq!(online.values(), as_f64(&plain(6)), "the online network is only read");
    }
}

#[test]
fn rounding_to_bf16_is_to_the_nearest_even() {
    // `apply` with mean 0, factors 1 and shift 0 only adds the residual in f32 and rounds.
    let compiled = Compiled::of("norm.cu", bf16::OPTIONS);
    let apply = kernel!(
        compiled,
        "apply",
        *const bf16,
        *const bf16,
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *mut bf16,
        Extent,
        u32
    );
    // 1 + 2⁻⁷ is the next number after 1. Halfway between the two, a bit more, and halfway to the next.
    let pairs = [(1., 0.00390625), (1., 0.0039368), (1.0078125, 0.00390625), (-1., -0.00390625)];
    let (mut z, mut residual) = (
        Guarded::<bf16>::new(pairs.map(|pair| pair.0)),
        Guarded::<bf16>::new(pairs.map(|pair| pair.1)),
    );
    let (mut zero, mut one) = (Guarded::<f32>::new([0.; 4]), Guarded::<f32>::new([1.; 4]));
    let (extent, mut y) = (Extent::new(1, 4), Guarded::<bf16>::unwritten(4));
    compiled.each_block(extent.blocks(), || {
        let (zero, one) = (zero.pointer(), one.pointer());
        // SAFETY: buffers of the extent.
        unsafe {
            apply(z.pointer(), residual.pointer(), zero, one, one, zero, y.pointer(), extent, 0)
        }
    });
    assert_eq!(y.values(), [1., 1.0078125, 1.015625, -1.]);
}

/// A case of a norm.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    channels: usize,
    relu: bool,
    residual: bool,
    batch: bool,
}

/// Sizes around those of a block, and one that would need more than 512 parts of 64 rows.
const CASES: [Case; 7] = [
    Case { rows: 2, channels: 1, relu: false, residual: false, batch: true },
    Case { rows: 7, channels: 33, relu: true, residual: false, batch: true },
    Case { rows: 64, channels: 32, relu: true, residual: true, batch: true },
    Case { rows: 65, channels: 40, relu: true, residual: true, batch: false },
    Case { rows: 130, channels: 5, relu: false, residual: true, batch: true },
    Case { rows: 333, channels: 100, relu: false, residual: false, batch: false },
    Case { rows: 32_991, channels: 3, relu: true, residual: true, batch: true },
];

const EPSILON: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

/// The results of a norm, by plain sums in f64.
struct Plain {
    mean: Vec<f64>,
    inverse: Vec<f64>,
    running: [Vec<f64>; 2],
    y: Vec<f64>,
    of_bias: Vec<f64>,
    of_weight: Vec<f64>,
    of_z: Vec<f64>,
    of_residual: Vec<f64>,
}

/// The inputs of a norm, as stored.
struct Inputs<T> {
    z: Guarded<T>,
    residual: Guarded<T>,
    gradient: Guarded<T>,
    weight: Guarded<f32>,
    bias: Guarded<f32>,
    running: [Guarded<f32>; 2],
}

impl<T: Stored> Inputs<T> {
    /// Channel `c` has a mean of about `100·c/channels`.
    fn of(case: Case) -> Inputs<T> {
        let (len, channels) = (case.rows * case.channels, case.channels);
        let mean = |at: usize| 100. * (at % channels) as f64 / channels as f64;
        Inputs {
            z: Guarded::new(noise(len, 1).enumerate().map(|(at, x)| x + mean(at))),
            residual: Guarded::new(noise(len, 2)),
            gradient: Guarded::new(noise(len, 3)),
            weight: Guarded::new(noise(channels, 4).map(|x| x + 1.5)),
            bias: Guarded::new(noise(channels, 5)),
            running: [
                Guarded::new((0..channels).map(mean)),
                Guarded::new(noise(channels, 7).map(|x| x + 1.2)),
            ],
        }
    }

    /// - `y`: the output as stored, which decides where the ReLU blocks.
    fn plain(&self, case: Case, y: Option<&[f64]>) -> Plain {
        let Case { rows, channels, relu, residual, batch } = case;
        let (z, r, g) = (self.z.values(), self.residual.values(), self.gradient.values());
        let (w, b) = (self.weight.values(), self.bias.values());
        let running = self.running.each_ref().map(Guarded::values);
        let mut plain = Plain {
            mean: vec![0.; channels],
            inverse: vec![0.; channels],
            running: running.clone(),
            y: vec![0.; z.len()],
            of_bias: vec![0.; channels],
            of_weight: vec![0.; channels],
            of_z: vec![0.; z.len()],
            of_residual: vec![0.; z.len()],
        };
        for c in 0..channels {
            let places = || (0..rows).map(|row| row * channels + c);
            let count = rows as f64;
            let mean_of_batch = places().map(|at| z[at]).sum::<f64>() / count;
            let squares: f64 = places().map(|at| (z[at] - mean_of_batch).powi(2)).sum();
            let follow = |running: &mut f64, batch: f64| *running += MOMENTUM * (batch - *running);
            if batch {
                follow(&mut plain.running[0][c], mean_of_batch);
                follow(&mut plain.running[1][c], squares / (count - 1.));
            }
            let (mean, variance) = match batch {
                true => (mean_of_batch, squares / count),
                false => (running[0][c], running[1][c]),
            };
            let inverse = 1. / (variance + EPSILON).sqrt();
            (plain.mean[c], plain.inverse[c]) = (mean, inverse);
            for at in places() {
                let sum =
                    (z[at] - mean) * inverse * w[c] + b[c] + if residual { r[at] } else { 0. };
                plain.y[at] = if relu { sum.max(0.) } else { sum };
                let open = !relu || y.is_none_or(|y| y[at] > 0.);
                plain.of_residual[at] = if open { g[at] } else { 0. };
                plain.of_bias[c] += plain.of_residual[at];
                plain.of_weight[c] += plain.of_residual[at] * (z[at] - mean) * inverse;
            }
            let (sum, product) = (plain.of_bias[c] / count, plain.of_weight[c] / count);
            for at in places() {
                let unit = (z[at] - mean) * inverse;
                let mean_terms = if batch { sum + unit * product } else { 0. };
                plain.of_z[at] = w[c] * inverse * (plain.of_residual[at] - mean_terms);
            }
        }
        plain
    }
}

fn norms_agree<T: Stored>() {
    let compiled = Compiled::of("norm.cu", T::OPTIONS);
    let of_parts = kernel!(compiled, "moments_of_parts", *const T, *mut f32, Extent);
    let moments = kernel!(
        compiled,
        "moments",
        *const f32,
        *const f32,
        *const f32,
        *mut f32,
        Extent,
        f32,
        f32
    );
    let apply = kernel!(
        compiled,
        "apply",
        *const T,
        *const T,
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *mut T,
        Extent,
        u32
    );
    let gradients_of_parts = kernel!(
        compiled,
        "gradients_of_parts",
        *const T,
        *const T,
        *const T,
        *const f32,
        *const f32,
        *mut f32,
        Extent
    );
    let gradients = kernel!(compiled, "gradients", *const f32, *mut f32, Extent);
    let of_values = kernel!(
        compiled,
        "gradients_of_values",
        *const T,
        *const T,
        *const T,
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *mut T,
        *mut T,
        Extent
    );
    for case in CASES {
        let Case { rows, channels, relu, residual, batch } = case;
        let (extent, len) = (Extent::new(rows, channels), rows * channels);
        let mut inputs = Inputs::<T>::of(case);
        let want = inputs.plain(case, None);

        let mut parts = Guarded::<f32>::unwritten(extent.parts() * 2 * channels);
        let (z, g) = (inputs.z.pointer(), inputs.gradient.pointer());
        let [mean, variance] = inputs.running.each_mut().map(Guarded::pointer);
        // SAFETY (here and below): buffers of the extent, as the kernels are declared.
        compiled.each_block(extent.blocks(), || unsafe { of_parts(z, parts.pointer(), extent) });
        let mut found = Guarded::<f32>::unwritten(4 * channels);
        compiled.each_block(extent.blocks_of_channels(), || unsafe {
            let (epsilon, momentum) = (EPSILON as f32, MOMENTUM as f32);
            moments(parts.pointer(), mean, variance, found.pointer(), extent, epsilon, momentum);
        });
        if batch {
            let found = found.values();
            near(&found[..channels], &want.mean, 1e-6, 1e-6);
            near(&found[channels..][..channels], &want.inverse, 2e-5, 0.);
            near(&found[2 * channels..][..channels], &want.running[0], 1e-6, 1e-6);
            near(&found[3 * channels..], &want.running[1], 2e-5, 1e-6);
        }

        let mut mean = Guarded::<f32>::new(want.mean.iter().copied());
        let mut inverse = Guarded::<f32>::new(want.inverse.iter().copied());
        let (w, b) = (inputs.weight.pointer(), inputs.bias.pointer());
        let (mean, inverse) = (mean.pointer(), inverse.pointer());
        let r = if residual { inputs.residual.pointer() } else { ptr::null_mut() };
        let mut y = Guarded::<T>::unwritten(len);
        compiled.each_block(extent.blocks(), || unsafe {
            apply(z, r, mean, inverse, w, b, y.pointer(), extent, u32::from(relu));
        });
        let stored = y.values();
        near(&stored, &want.y, T::ROUNDING, 1e-4);

        // The ReLU blocks where its stored output is zero.
        let want = inputs.plain(case, Some(&stored));
        let y = if relu { y.pointer() } else { ptr::null_mut() };
        let mut parts = Guarded::<f32>::unwritten(extent.parts() * 2 * channels);
        compiled.each_block(extent.blocks(), || unsafe {
            gradients_of_parts(g, y, z, mean, inverse, parts.pointer(), extent);
        });
        let mut sums = Guarded::<f32>::unwritten(2 * channels);
        compiled.each_block(extent.blocks_of_channels(), || unsafe {
            gradients(parts.pointer(), sums.pointer(), extent);
        });
        near(&sums.values()[..channels], &want.of_bias, 1e-5, 1e-4);
        near(&sums.values()[channels..], &want.of_weight, 1e-5, 2e-3);

        let sums = if batch { sums.pointer() } else { ptr::null_mut() };
        for [to_input, to_residual] in [[true, true], [true, false], [false, true]] {
            let (mut of_z, mut of_r) = (Guarded::<T>::unwritten(len), Guarded::<T>::unwritten(len));
            let into =
                |to: bool, made: &mut Guarded<T>| if to { made.pointer() } else { ptr::null_mut() };
            let (z_into, r_into) = (into(to_input, &mut of_z), into(to_residual, &mut of_r));
            compiled.each_block(extent.blocks(), || unsafe {
                of_values(g, y, z, mean, inverse, w, sums, z_into, r_into, extent);
            });
            if to_input {
                near(&of_z.values(), &want.of_z, T::ROUNDING, 1e-4);
            }
            if to_residual {
                near(&of_r.values(), &want.of_residual, 0., 0.);
            }
        }
    }
}

#[test]
fn norms_of_f32_match_the_formula() {
    norms_agree::<f32>();
}

#[test]
fn norms_of_bf16_match_the_formula() {
    norms_agree::<bf16>();
}

#[test]
fn the_relu_does_not_hide_a_nan() {
    let compiled = Compiled::of("norm.cu", &[]);
    let apply = kernel!(
        compiled,
        "apply",
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *const f32,
        *mut f32,
        Extent,
        u32
    );
    let mut z = Guarded::<f32>::new([-1., f64::NAN, 1.]);
    let (mut zero, mut one) = (Guarded::<f32>::new([0.]), Guarded::<f32>::new([1.]));
    let (extent, mut y) = (Extent::new(3, 1), Guarded::<f32>::unwritten(3));
    compiled.each_block(extent.blocks(), || {
        let (zero, one) = (zero.pointer(), one.pointer());
        // SAFETY: buffers of the extent, and no residual.
        unsafe { apply(z.pointer(), ptr::null(), zero, one, one, zero, y.pointer(), extent, 1) }
    });
    let y = y.values();
    assert!(y[0] == 0. && y[1].is_nan() && y[2] == 1., "{y:?}");
}
