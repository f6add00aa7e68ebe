//! Agreement with torchvision, measured by `tests/reference.py` of this crate.

use serde::Deserialize;
use stage::random::stream;

use super::*;
use crate::Picture;
use crate::views::blur;
use crate::views::colour::ColourChange;
use crate::views::resize::{self, Area};

/// What the script wrote.
#[derive(Deserialize)]
struct ReferenceDraws {
    draws: u64,
    /// Mean and standard deviation over the draws, as below.
    crops: Vec<[f64; 2]>,
    rates: std::collections::BTreeMap<String, f64>,
    #[serde(rename = "view 1")]
    view_1: Vec<[f64; 2]>,
    #[serde(rename = "view 2")]
    view_2: Vec<[f64; 2]>,
    /// `(height, width, channels)` in 65535ths.
    operations: std::collections::BTreeMap<String, Vec<i64>>,
}

fn reference() -> ReferenceDraws {
    serde_json::from_str(include_str!("../../tests/torchvision.json")).expect("as written")
}

/// The picture of the script: neither square nor symmetric, the colours all different.
fn picture(height: usize, width: usize) -> Picture {
    let value = |i: usize| {
        let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
        ((x * x * (c + 2) + y * y * (5 - c) + 3 * x * y) / 8 + 60 * c) % 256
    };
    let pixels = (0..height * width * 3).map(|i| value(i) as u8).collect();
    Picture::new(height, width, 3, pixels).expect("sound")
}

#[test]
fn each_operation_agrees_with_torchvision() {
    let small = picture(11, 14);
    let changed = |change: &dyn Fn(&mut Canvas)| {
        let mut canvas = Canvas::default();
        canvas.load(&small);
        change(&mut canvas);
        canvas
    };
    let jittered = |change: ColourChange| changed(&|canvas| change.apply(canvas));
    let blurred = |extent, deviation| {
        changed(&|canvas| {
            let (plain, mut buffers) = (canvas.clone(), blur::BlurBuffers::default());
            blur::apply(&plain, canvas, extent, deviation, &mut buffers).expect("large enough");
        })
    };
    let resized = |part, to, filter| {
        let area = Area::new(part, to, filter);
        changed(&|canvas| {
            resize::from_picture(&small, &area, canvas, &mut resize::ResizeBuffers::default());
        })
    };
    let (bilinear, bicubic) = (Filter::Bilinear, Filter::Bicubic);
    let ours = [
        ("brightness 0.6", jittered(ColourChange::Brightness(0.6))),
        ("brightness 1.4", jittered(ColourChange::Brightness(1.4))),
        ("contrast 0.6", jittered(ColourChange::Contrast(0.6))),
        ("contrast 1.4", jittered(ColourChange::Contrast(1.4))),
        ("saturation 0.6", jittered(ColourChange::Saturation(0.6))),
        ("saturation 1.4", jittered(ColourChange::Saturation(1.4))),
        ("hue 0.1", jittered(ColourChange::Hue(0.1))),
        ("hue -0.3", jittered(ColourChange::Hue(-0.3))),
        ("grey", changed(&colour::grey)),
        ("solarise", changed(&|canvas| colour::solarise(canvas, 128.))),
        ("flip", changed(&Canvas::flip)),
        ("blur 5 0.7", blurred(5, 0.7)),
        ("blur 9 2", blurred(9, 2.)),
        ("shrink", resized([2, 1, 8, 12], [5, 6], bilinear)),
        ("enlarge", resized([2, 1, 8, 12], [9, 13], bilinear)),
        ("shrink bicubic", resized([0, 0, 11, 14], [4, 6], bicubic)),
        ("enlarge bicubic", resized([3, 4, 5, 6], [8, 11], bicubic)),
    ];
    let reference = reference().operations;
    assert_eq!(ours.len(), reference.len());
    for (name, canvas) in ours {
        let want = &reference[name];
        let (pixels, values) = (canvas.pixels(), &canvas.values);
        assert_eq!(values.len(), want.len(), "{name}");
        let differences = want.iter().enumerate().map(|(i, &want)| {
            (f64::from(values[i % 3 * pixels + i / 3]) - want as f64 / 65535.).abs()
        });
        let (sum, most) = differences.fold((0., 0f64), |(sum, most), d| (sum + d, most.max(d)));
        let mean = sum / want.len() as f64;
        // The reference is rounded to 65535ths, so that half of one is left: a 500th of 1/255.
        assert!(mean < 0.6 / 65535. && most < 1.2 / 65535., "{name}: mean {mean}, most {most}");
    }
}

/// Whether two means over the draws differ by less than five standard deviations of their difference,
/// and the deviations of single draws by less than a twelfth.
fn assert_alike(what: &str, ours: &[Vec<f64>], theirs: &[[f64; 2]]) {
    assert_eq!(ours[0].len(), theirs.len());
    let n = ours.len() as f64;
    for (k, &[mean, deviation]) in theirs.iter().enumerate() {
        let our_mean = ours.iter().map(|draw| draw[k]).sum::<f64>() / n;
        let squares = ours.iter().map(|draw| (draw[k] - our_mean).powi(2)).sum::<f64>();
        let our_deviation = (squares / n).sqrt();
        let tolerance = 5. * deviation * (2. / n).sqrt();
        assert!(
            (our_mean - mean).abs() < tolerance
                && (our_deviation / deviation - 1.).abs() < 1. / 12.,
            "{what} {k}: mean {our_mean} ± {our_deviation}, not {mean} ± {deviation}"
        );
    }
}

#[test]
fn random_crops_have_the_area_aspect_and_place_of_torchvision_s() {
    let reference = reference();
    let mut rng = stream(4, "agreement", &[0]);
    let draw = |_| {
        let [top, left, h, w] =
            operation::random_crop(60, 80, [0.08, 1.], [3. / 4., 4. / 3.], &mut rng)
                .map(|number| number as f64);
        vec![h * w / 4800., (w / h).ln(), (left + w / 2.) / 80., (top + h / 2.) / 60.]
    };
    let ours: Vec<_> = (0..reference.draws).map(draw).collect();
    assert_alike("crops", &ours, &reference.crops);
}

/// The operations of BYOL's pair in their order, for pictures of 32 pixels.
fn operations(second: bool) -> Vec<Operation> {
    let blur = if second { 0.1 } else { 1. };
    vec![
        Operation::ResizedCrop { scale: [0.08, 1.], aspect: [3. / 4., 4. / 3.] },
        Operation::Flip { probability: 0.5 },
        Operation::Jitter {
            probability: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.2,
            hue: 0.1,
        },
        Operation::Grey { probability: 0.2 },
        Operation::Blur { probability: blur, kernel: 5, deviation: [0.1, 2.] },
        Operation::Solarise { probability: if second { 0.2 } else { 0. }, threshold: 128. },
    ]
}

#[test]
fn operations_happen_as_often_as_torchvision_s() {
    let reference = reference();
    let picture = picture(30, 40);
    let input = Input {
        height: 30,
        width: 40,
        channels: 3,
        mean: vec![0.; 3],
        std: vec![1.; 3],
        clean: vec![],
    };
    let mut workspace = Workspace::default();
    let mut view = |operations: Vec<Operation>, draw| {
        let mut out = vec![0.; input.values()];
        let mut rng = stream(4, "agreement", &[1, draw]);
        let pipeline = Pipeline { operations };
        pipeline.apply(&picture, &input, &mut rng, &mut workspace, &mut out).expect("made");
        out
    };
    let plain = view(vec![], 0);
    let names = ["flip", "jitter", "grey", "blur", "solarise"];
    for (name, operation) in names.into_iter().zip(operations(true).split_off(1)) {
        let changed = (0..reference.draws).filter(|&draw| view(vec![operation], draw) != plain);
        let (n, theirs) = (reference.draws as f64, reference.rates[name]);
        let ours = changed.count() as f64 / n;
        let tolerance = 5. * (2. * theirs * (1. - theirs) / n).sqrt();
        assert!((ours - theirs).abs() < tolerance, "{name}: {ours}, not {theirs}");
    }
}

/// What the script measures of a view.
fn measure(view: &[f32], input: &Input) -> Vec<f64> {
    let (n, side) = (view.len() / 3, input.width);
    let channel = |c: usize| view.iter().skip(c).step_by(3).map(|&value| f64::from(value));
    let mean = |c: usize| channel(c).sum::<f64>() / n as f64;
    let deviation = |c: usize| {
        let mean = mean(c);
        (channel(c).map(|value| (value - mean).powi(2)).sum::<f64>() / n as f64).sqrt()
    };
    let plain = |i: usize| f64::from(view[i]) * input.std[i % 3] + input.mean[i % 3];
    let alike = |i: usize, k: usize| (plain(3 * i) - plain(3 * i + k)).abs() < 1e-4;
    let grey = (0..n).all(|i| alike(i, 1) && alike(i, 2));
    let across = |step: usize| {
        let places = (0..view.len()).filter(move |i| i / 3 % side + step < side);
        places.map(move |i| plain(i + 3 * step) - plain(i))
    };
    let rough = across(1).map(f64::abs).sum::<f64>() / across(1).count() as f64;
    let slope = across(side / 2).sum::<f64>() / across(side / 2).count() as f64;
    let mut all: Vec<f64> = (0..3).map(mean).chain((0..3).map(deviation)).collect();
    all.extend([f64::from(u8::from(grey)), rough, slope]);
    all
}

#[test]
fn views_are_distributed_as_torchvision_s() {
    let reference = reference();
    let picture = picture(60, 80);
    let input = Input {
        height: 32,
        width: 32,
        channels: 3,
        mean: vec![0.485, 0.456, 0.406],
        std: vec![0.229, 0.224, 0.225],
        clean: vec![],
    };
    let mut workspace = Workspace::default();
    for (second, theirs) in [(false, &reference.view_1), (true, &reference.view_2)] {
        let pipeline = Pipeline { operations: operations(second) };
        let draw = |draw| {
            let mut out = vec![0.; input.values()];
            let mut rng = stream(4, "agreement", &[2 + u64::from(second), draw]);
            pipeline.apply(&picture, &input, &mut rng, &mut workspace, &mut out).expect("made");
            measure(&out, &input)
        };
        let ours: Vec<_> = (0..reference.draws).map(draw).collect();
        assert_alike(if second { "view 2" } else { "view 1" }, &ours, theirs);
    }
}
