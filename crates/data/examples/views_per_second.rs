//! How many pictures a second become two views, by kind of picture and of views.
//!
//! `cargo run --release -p data --example views_per_second -- [FOLDER of JPEG files] [WORK]`
//!
//! Prints processor time, not clock time, so that a busy machine disturbs it little: microseconds
//! per picture on one core, and pictures per second on two cores with nothing else to do. `WORK`
//! restricts it to kinds of work whose name contains the word.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use data::images::{Identical, Images, Source, Writer};
use data::views::{Filter, Input, Operation, Pipeline};
use data::{Loader, Picture};
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{ExtendedColorType, RgbImage};
use stage::Split;

/// Seconds of processor time for each measurement.
const SECONDS: f64 = 2.;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let only = arguments.get(1).map_or("", String::as_str);
    let scratch = tempfile::tempdir()?;
    let measure =
        |name: &str, sources: &dyn Fn() -> Result<Vec<Source>>, input: Input, operations| {
            if !name.contains(only) {
                return Ok(());
            }
            let path = scratch.path().join("images.safetensors");
            let sources = sources()?;
            let channels = input.channels;
            let mut writer = Writer::create(&path, channels, Identical::Keep)?;
            for source in &sources {
                writer.add(source, Split::Train)?;
            }
            writer.finish(None)?;
            report(name, &path, &input, Pipeline { operations })
        };

    let raw = |side, channels| move || random_pictures(2000, side, channels);
    measure("digits 8", &raw(8, 1), square(8, 1), digits())?;
    measure("digits 28", &raw(28, 1), square(28, 1), digits())?;
    measure("array 32", &raw(32, 3), square(32, 3), byol(None))?;
    measure("array 32 blur 3", &raw(32, 3), square(32, 3), byol(Some(3)))?;
    measure("array 32 blur 23", &raw(32, 3), square(32, 3), byol(Some(23)))?;
    if let Some(folder) = arguments.first() {
        let files = || jpeg_files(Path::new(folder));
        measure("jpeg as found to 64", &files, square(64, 3), byol(None))?;
        measure("jpeg as found to 96", &files, square(96, 3), byol(None))?;
        measure("jpeg as found to 96 blur 23", &files, square(96, 3), byol(Some(23)))?;
        let large = || enlarged(Path::new(folder), 500, 375);
        measure("jpeg 500x375 to 96", &large, square(96, 3), byol(None))?;
        measure("jpeg 500x375 to 96 blur 9", &large, square(96, 3), byol(Some(9)))?;
        measure("jpeg 500x375 to 224", &large, square(224, 3), byol(None))?;
        measure("jpeg 500x375 to 224 blur 23", &large, square(224, 3), byol(Some(23)))?;
        measure("jpeg 500x375 clean 96", &large, square(96, 3), clean())?;
    }
    Ok(())
}

fn report(name: &str, path: &Path, input: &Input, pipeline: Pipeline) -> Result<()> {
    for kept in [true, false] {
        let images = Images::open(path)?;
        let encoded = images.size(0)? != (input.height, input.width);
        if !kept && !encoded {
            continue;
        }
        images.keep_decoded(if kept { 1 << 30 } else { 0 });
        let rows = images.rows(&[Split::Train]);
        let batches: Vec<Vec<u32>> = rows.chunks(64).map(<[u32]>::to_vec).collect();
        let epoch = |epoch| -> Result<f32> {
            let views = vec![pipeline.clone(), pipeline.clone()];
            Loader::new(&images, batches.clone(), views, input, 0, epoch, 2)?
                .try_fold(0f32, |sum, batch| Ok(sum + batch?.views[0][0]))
        };
        epoch(0)?;
        let start = processor_seconds()?;
        let (mut epochs, mut spent) = (0, 0.);
        while spent < SECONDS {
            epochs += 1;
            epoch(epochs)?;
            spent = processor_seconds()? - start;
        }
        let each = spent / (epochs as f64 * rows.len() as f64);
        let decoding = if !encoded {
            ""
        } else if kept {
            "decoded kept"
        } else {
            "decoding"
        };
        println!("{name:28} {decoding:13} {:8.1} µs {:9.0} /s", each * 1e6, 2. / each);
    }
    Ok(())
}

/// Processor time of this process: fields 14 and 15 of `stat`, in hundredths of a second.
fn processor_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("this example needs Linux")?;
    let fields = stat.rsplit(')').next().context("a name in brackets")?.split_whitespace();
    let times: Vec<f64> = fields.skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(times.iter().sum::<f64>() / 100.)
}

fn square(side: usize, channels: usize) -> Input {
    Input {
        height: side,
        width: side,
        channels,
        mean: vec![0.5; channels],
        std: vec![0.25; channels],
        clean: vec![],
    }
}

fn byol(blur: Option<usize>) -> Vec<Operation> {
    let mut operations = vec![
        Operation::ResizedCrop { scale: [0.08, 1.], aspect: [3. / 4., 4. / 3.] },
        Operation::Flip { probability: 0.5 },
        Operation::Jitter {
            probability: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.4,
            hue: 0.1,
        },
        Operation::Grey { probability: 0.2 },
    ];
    operations.extend(blur.map(|kernel| Operation::Blur {
        probability: 0.5,
        kernel,
        deviation: [0.1, 2.],
    }));
    operations
}

fn digits() -> Vec<Operation> {
    vec![
        Operation::Affine {
            degrees: 15.,
            log_scale: 0.15,
            log_aspect: 0.1,
            shear: 0.15,
            shift: 0.15,
        },
        Operation::Elastic { grid: 4, deviation: 0.06 },
        Operation::Gamma { log_range: 0.5 },
        Operation::ContrastScale { range: 0.4 },
        Operation::Noise { deviation: 0.05 },
    ]
}

fn clean() -> Vec<Operation> {
    vec![
        Operation::ResizeShorter { pixels: 256, filter: Filter::Bilinear },
        Operation::CentreCrop { pixels: 224 },
        Operation::Resize { pixels: 96, filter: Filter::Bicubic },
    ]
}

fn random_pictures(count: u64, side: usize, channels: usize) -> Result<Vec<Source>> {
    use rand::Rng;
    let picture = |number| {
        let mut pixels = vec![0; side * side * channels];
        stage::random::stream(0, "pictures", &[number]).fill_bytes(&mut pixels);
        Source::raw(Picture::new(side, side, channels, pixels)?, channels)
    };
    (0..count).map(picture).collect()
}

fn jpeg_files(folder: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        sources.push(Source::file(fs::read(entry?.path())?, 3)?);
        if sources.len() == 400 {
            break;
        }
    }
    Ok(sources)
}

/// The same pictures at another size, at quality 90.
fn enlarged(folder: &Path, width: u32, height: u32) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder)?.take(200) {
        let picture = data::picture::decode(&fs::read(entry?.path())?, 3)?;
        let size = (picture.width as u32, picture.height as u32);
        let picture = RgbImage::from_raw(size.0, size.1, picture.pixels).context("fits")?;
        let picture = imageops::resize(&picture, width, height, FilterType::CatmullRom);
        let mut file = Vec::new();
        JpegEncoder::new_with_quality(&mut file, 90).encode(
            picture.as_raw(),
            width,
            height,
            ExtendedColorType::Rgb8,
        )?;
        sources.push(Source::file(file, 3)?);
    }
    Ok(sources)
}
