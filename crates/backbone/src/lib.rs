//! Backbones: the residual networks that turn pictures into embeddings, the small networks behind
//! them, and their files.
//!
//! A [`Segment`] is one of the three parts a picture passes through: backbone (picture to
//! embedding), projector (embedding to projection), predictor (projection to prediction). It is a
//! [plan](layers::Network) with its values. The plans are told in [`resnet`] and [`perceptron`],
//! first weights in [`Segment::random`], the files in [`network_file`], [`backbone_file`] and
//! [`Configuration`].
//!
//! This crate knows no picture files, no loss and no training.
//!
//! # In Python
//!
//! `backbone.safetensors` holds timm's names and shapes. A network with the `7x7` stem, width 64
//! and depth 18, 34 or 50 loads as it is:
//!
//! ```python
//! model = timm.create_model("resnet18", num_classes=0)
//! model.load_state_dict(safetensors.torch.load_file("backbone.safetensors"))
//! ```
//!
//! For the stems with a 3×3 convolution, stem and pool are exchanged first:
//!
//! ```python
//! model = timm.create_model("resnet18", num_classes=0)
//! model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
//! model.load_state_dict(safetensors.torch.load_file("backbone.safetensors"))
//! ```
//!
//! with `torch.nn.MaxPool2d(2)` in place of `Identity()` for `3x3-pool`, and
//! `torch.nn.MaxPool2d(2, padding=1)` for `3x3-pool-padded`. Input size, mean and standard
//! deviation stand in `config.json` beside it.

mod architecture;
pub mod backbone_file;
mod configuration;
mod initial;
pub mod network_file;
pub mod perceptron;
pub mod resnet;
mod segment;

pub use architecture::{Architecture, Depth, Predictor, Projector, Stem};
pub use configuration::{CONFIGURATION, Configuration, Encoder, write_configuration};
pub use segment::Segment;
