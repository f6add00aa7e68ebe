//! Three classes of small grey pictures, neither square nor symmetric: what a network can learn to
//! tell apart in seconds.

use std::fs;
use std::path::Path;

use anyhow::Result;
use image::{GrayImage, Luma};

/// Rows of a picture.
pub const HEIGHT: u32 = 8;
/// Columns of a picture.
pub const WIDTH: u32 = 10;
/// Number of classes.
pub const CLASSES: usize = 3;
/// Number of pictures.
pub const PICTURES: usize = 90;

/// How a data set is laid out: the same pictures can bear any names, in any order.
#[derive(Debug, Clone, Copy)]
pub struct PictureNames {
    /// Name of the folder of each class.
    pub classes: [&'static str; CLASSES],
    /// Whether the last picture of a class comes first by name.
    pub backwards: bool,
}

/// The layout that tests use unless they are about layouts.
pub const PLAIN: PictureNames =
    PictureNames { classes: ["bars", "corners", "steps"], backwards: false };

/// Writes the data set drawn from `seed` as one folder for each class.
///
/// # Errors
///
/// A file cannot be written.
pub fn write(folder: &Path, layout: PictureNames, seed: u64) -> Result<()> {
    for number in 0..PICTURES {
        let class = number % CLASSES;
        let folder = folder.join(layout.classes[class]);
        fs::create_dir_all(&folder)?;
        let name = if layout.backwards { PICTURES - number } else { number };
        picture(class, number as u64, seed).save(folder.join(format!("{name:03}.png")))?;
    }
    Ok(())
}

/// Picture `number` of a class: its shape, moved a little, under noise.
fn picture(class: usize, number: u64, seed: u64) -> GrayImage {
    let mut draws = Draws(seed.wrapping_mul(1_000_003).wrapping_add(number));
    let (down, right) = (draws.below(2), draws.below(3));
    GrayImage::from_fn(WIDTH, HEIGHT, |x, y| {
        let (x, y) = (x + 3 - right, y + 2 - down);
        let ink = match class {
            0 => y == 4 || y == 7,
            1 => (x == 5 && y > 3) || (y == 8 && x > 5),
            _ => x / 3 == y / 2,
        };
        let noise = draws.below(50) as u8;
        Luma([if ink { 200 + noise } else { noise }])
    })
}

/// Equal draws on every machine (SplitMix64).
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % u64::from(bound)) as u32
    }
}
