//! Backbones: the residual networks that map images to embeddings, the small networks after them, and their
//! files.
//!
//! A [`Segment`] is one of the three parts that an image passes through: backbone (image to embedding),
//! projector (embedding to projection), predictor (projection to prediction). It is a
//! [plan](layers::Network) with its parameters and statistics. The plans are in [`resnet`] and
//! [`perceptron`], the initial weights in [`Segment::random`], the files in [`network_file`],
//! [`backbone_file`] and [`Configuration`]:
//!
//! ```
//! use backbone::{Architecture, Depth, Segment, Stem, backbone_file, resnet};
//! use candle_core::{DType, Device, Tensor};
//!
//! # fn main() -> anyhow::Result<()> {
//! let architecture = Architecture { depth: Depth::Ten, width: 8, stem: Stem::Plain };
//! let mut backbone = Segment::random("backbone", resnet::plan(&architecture, 3)?, 0)?;
//! let images = Tensor::zeros((2, 32, 32, 3), DType::F32, &Device::Cpu)?; // (N, H, W, C)
//! let embeddings = backbone.infer(&images)?;
//! assert_eq!(embeddings.dims(), [2, architecture.embedding_width()]);
//!
//! let folder = tempfile::tempdir()?;
//! backbone_file::write(folder.path(), &backbone)?; // Under timm's names.
//! let mut copy = Segment::empty(resnet::plan(&architecture, 3)?);
//! backbone_file::read(&folder.path().join(backbone_file::NAME), &mut copy)?;
//! assert_eq!(copy.infer(&images)?.to_vec2::<f32>()?, embeddings.to_vec2::<f32>()?);
//! # Ok(())
//! # }
//! ```
//!
//! [`published`] reads networks that others have trained, such as DINOv2.
//!
//! This crate knows no image files, no loss and no training.
//!
//! # In Python
//!
//! `backbone.safetensors` holds timm's names and shapes. A network with the `7x7` stem, width 64
//! and depth 18, 34 or 50 loads unchanged:
//!
//! ```python
//! model = timm.create_model("resnet18", num_classes=0)
//! model.load_state_dict(safetensors.torch.load_file("backbone.safetensors"))
//! ```
//!
//! For the stems with a 3×3 convolution, replace stem and pool first:
//!
//! ```python
//! model = timm.create_model("resnet18", num_classes=0)
//! model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
//! model.load_state_dict(safetensors.torch.load_file("backbone.safetensors"))
//! ```
//!
//! with `torch.nn.MaxPool2d(2)` in place of `Identity()` for `3x3-pool`, and
//! `torch.nn.MaxPool2d(2, padding=1)` for `3x3-pool-padded`. Input size, mean and standard deviation are in
//! the `config.json` of the same folder.

mod architecture;
pub mod backbone_file;
mod configuration;
mod initial;
pub mod network_file;
pub mod perceptron;
pub mod published;
pub mod resnet;
mod segment;

pub use architecture::{Architecture, Depth, Predictor, Projector, Stem};
pub use configuration::{CONFIGURATION, Configuration, Encoder, write_configuration};
pub use segment::Segment;
