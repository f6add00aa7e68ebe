//! The heads: several sets of centres over one network, each with the cluster of every image.

use anyhow::Result;
use assignment::shares;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use layers::Sgd;
use rand_distr::{Distribution, StandardNormal};
use training::ops::unit_rows;
use training::{Checkpoint, TrainedVariable};

use crate::constraint::{Balance, Before, Constraint};
use crate::loss::{centre_loss, representation_loss};

/// One head of `K` clusters.
#[derive(Debug)]
pub struct SeCuHead {
    /// Name in files: `heads.<number>`.
    name: String,
    /// The raw centres, `(K, P)`: their lengths have no meaning, but the gradient shrinks with them.
    centres: TrainedVariable<Sgd>,
    /// The unit-length centres at the start of the epoch, `(K, P)`: constants.
    frozen: Tensor,
    balance: Balance,
    /// Cluster of each image to train on.
    ids: Vec<u32>,
}

/// The temperatures and the share of the losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperatures {
    /// Of the network's loss, `tₓ`.
    pub network: f64,
    /// Of the centres' loss, `t_w`.
    pub centres: f64,
    /// Share of the assigned cluster in the network's target.
    pub assigned_share: f64,
}

/// The losses and clusters of one step of a head.
#[derive(Debug)]
pub struct HeadStep {
    /// Its gradient reaches the network alone.
    pub representation_loss: Tensor,
    /// Its gradient reaches the centres alone.
    pub centre_loss: Tensor,
    /// The new clusters of the batch.
    pub ids: Vec<u32>,
}

impl SeCuHead {
    /// Head `number` with centres in random directions, of unit length.
    ///
    /// - `images`: number of images to train on.
    pub fn random(
        number: usize,
        clusters: usize,
        width: usize,
        images: usize,
        constraint: Constraint,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut random = stage::random::stream(seed, "centres", &[number as u64]);
        let values: Vec<f32> =
            StandardNormal.sample_iter(&mut random).take(clusters * width).collect();
        let centres = unit_rows(&Tensor::from_vec(values, (clusters, width), device)?)?;
        let name = format!("heads.{number}");
        Ok(Self {
            centres: TrainedVariable::new(format!("{name}.centres"), &centres)?,
            name,
            frozen: centres,
            balance: Balance::new(constraint, clusters),
            // Never read before they are written: the first epoch trains on its own ids.
            ids: vec![0; images],
        })
    }

    /// The unit-length centres, `(K, P)`; the gradient passes.
    pub fn directions(&self) -> candle_core::Result<Tensor> {
        unit_rows(&self.centres.variable)
    }

    /// Copies the centres for the network's loss of this epoch.
    pub fn freeze(&mut self) -> Result<()> {
        self.frozen = self.directions()?.detach();
        Ok(())
    }

    /// One step: assigns the batch, stores its new clusters, and computes both losses.
    ///
    /// The images are assigned by the *current* centres. The network learns toward the clusters of
    /// the epoch before, which are read before the new ones are stored; in the first epoch it learns
    /// toward the new ones.
    ///
    /// - `directions`: unit-length projections of view 1 and 2, `(B, P)`.
    /// - `places`: indices of the batch's images among those to train on.
    /// - `epoch`: from 0.
    ///
    /// # Errors
    ///
    /// The shapes do not fit, or a similarity is NaN.
    pub fn step(
        &mut self,
        [view_1, view_2]: [&Tensor; 2],
        places: &[usize],
        epoch: usize,
        with: Temperatures,
    ) -> Result<HeadStep> {
        // The centres' side: the projections are constants.
        let centres = self.directions()?.t()?;
        let similarity_1 = view_1.detach().matmul(&centres)?;
        let similarity_2 = view_2.detach().matmul(&centres)?;
        let mean = ((&similarity_1 + &similarity_2)?.detach() * 0.5)?;
        let mean = mean.flatten_all()?.to_vec1::<f32>()?;

        let before: Vec<u32> = places.iter().map(|&place| self.ids[place]).collect();
        let ids = match epoch {
            0 => self.balance.assign(&mean, Before::Nothing)?,
            _ => {
                let images = self.ids.len();
                self.balance.assign(&mean, Before::Assigned { ids: &before, images })?
            }
        };
        places.iter().zip(&ids).for_each(|(&place, &id)| self.ids[place] = id);

        let device = view_1.device();
        let now = Tensor::new(ids.as_slice(), device)?;
        let loss_1 = centre_loss(&similarity_1, &now, with.centres)?;
        let loss_2 = centre_loss(&similarity_2, &now, with.centres)?;

        // The network's side: the centres are those of the start of the epoch.
        let toward = if epoch == 0 { now } else { Tensor::new(before.as_slice(), device)? };
        let frozen = self.frozen.t()?;
        let logits_1 = (view_1.matmul(&frozen)? / with.network)?;
        let logits_2 = (view_2.matmul(&frozen)? / with.network)?;
        Ok(HeadStep {
            representation_loss: representation_loss(
                [&logits_1, &logits_2],
                &toward,
                with.assigned_share,
            )?,
            centre_loss: ((loss_1 + loss_2)? * 0.5)?,
            ids,
        })
    }

    /// Moves the centres along their gradient.
    pub fn descend(&mut self, gradients: &GradStore, rule: Sgd) -> Result<()> {
        Ok(self.centres.step(gradients, rule)?)
    }

    /// The name of the centres if their gradient is not finite.
    pub fn gradient_not_finite(
        &self,
        gradients: &GradStore,
    ) -> candle_core::Result<Option<String>> {
        self.centres.gradient_not_finite(gradients)
    }

    /// Size of the largest cluster divided by `N/K`.
    ///
    /// # Errors
    ///
    /// A stored cluster is not below `K`.
    pub fn largest_share(&self) -> Result<f64> {
        Ok(shares(&self.ids, self.balance.values().len())?.largest)
    }

    /// Saves or loads the centres, and `stage.heads.<number>.*`: the frozen centres, the balance,
    /// the clusters of the images.
    ///
    /// # Errors
    ///
    /// The file has other heads.
    pub fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        let Self { name, centres, frozen, balance, ids } = self;
        centres.checkpoint(file)?;
        file.tensor(&format!("{name}.frozen"), frozen)?;
        file.list(&format!("{name}.balance"), balance.values_mut())?;
        file.list(&format!("{name}.ids"), ids)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use candle_core::Device::Cpu;
    use candle_core::Var;

    use super::*;

    const SIZE: Constraint = Constraint::Size { lower_bound: 0.9, rate: 0.1 };
    const WITH: Temperatures = Temperatures { network: 0.05, centres: 0.05, assigned_share: 0.2 };

    fn head(images: usize) -> Result<SeCuHead> {
        SeCuHead::random(0, 3, 4, images, SIZE, 7, &Cpu)
    }

    /// Unit-length projections of a view, by number.
    fn view(number: u64) -> Result<Tensor> {
        let values = training::noise(1., (5, 4), number, &[], &Cpu)?;
        Ok(unit_rows(&values.context("a deviation above 0")?)?)
    }

    const PLACES: [usize; 5] = [4, 0, 2, 5, 1];

    #[test]
    fn centres_begin_at_unit_length_in_directions_of_their_seed() -> Result<()> {
        let lengths = head(6)?.centres.variable.sqr()?.sum(1)?.to_vec1::<f32>()?;
        assert!(lengths.iter().all(|length| (length - 1.).abs() < 1e-6), "{lengths:?}");
        let values = |head: SeCuHead| head.centres.variable.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(head(6)?)?, values(head(6)?)?);
        assert_ne!(values(head(6)?)?, values(SeCuHead::random(1, 3, 4, 6, SIZE, 7, &Cpu)?)?);
        assert_ne!(values(head(6)?)?, values(SeCuHead::random(0, 3, 4, 6, SIZE, 8, &Cpu)?)?);
        Ok(())
    }

    /// SeCu, case T13.
    #[test]
    fn each_loss_reaches_its_own_parameters_alone() -> Result<()> {
        for epoch in [0, 1] {
            let mut head = head(6)?;
            head.freeze()?; // The copy is a constant too.
            let (view_1, view_2) = (Var::from_tensor(&view(1)?)?, Var::from_tensor(&view(2)?)?);
            let found = head.step([&view_1, &view_2], &PLACES, epoch, WITH)?;
            let of_centres = found.centre_loss.backward()?;
            assert!(of_centres.get(&head.centres.variable).is_some());
            assert!(of_centres.get(&view_1).is_none() && of_centres.get(&view_2).is_none());
            let of_network = found.representation_loss.backward()?;
            assert!(of_network.get(&head.centres.variable).is_none());
            assert!(of_network.get(&view_1).is_some() && of_network.get(&view_2).is_some());
        }
        Ok(())
    }

    /// SeCu, case T14, and gotcha 4.
    #[test]
    fn the_network_sees_the_centres_of_the_epochs_beginning() -> Result<()> {
        let views = [view(1)?, view(2)?];
        let loss = |head: &mut SeCuHead| -> Result<f32> {
            let found = head.step([&views[0], &views[1]], &PLACES, 1, WITH)?;
            Ok(found.representation_loss.to_scalar()?)
        };
        let mut moved = head(6)?;
        let other = SeCuHead::random(3, 3, 4, 6, SIZE, 7, &Cpu)?;
        moved.centres.variable.set(&other.centres.variable)?;
        let want = loss(&mut head(6)?)?;
        assert_eq!(loss(&mut moved)?, want);
        let mut frozen_anew = head(6)?;
        frozen_anew.centres.variable.set(&other.centres.variable)?;
        frozen_anew.freeze()?;
        assert_ne!(loss(&mut frozen_anew)?, want);
        Ok(())
    }

    /// Gotcha 3 of the specification: what is read, and when it is written.
    #[test]
    fn the_first_epoch_trains_on_its_own_ids_and_later_ones_on_those_before() -> Result<()> {
        let views = [view(1)?, view(2)?];
        let views = [&views[0], &views[1]];
        let loss = |ids: &[u32], head: &SeCuHead| -> Result<f32> {
            let logits = |view: &Tensor| view.matmul(&head.frozen.t()?)? / WITH.network;
            let (logits_1, logits_2) = (logits(views[0])?, logits(views[1])?);
            let ids = Tensor::new(ids, &Cpu)?;
            Ok(representation_loss([&logits_1, &logits_2], &ids, 0.2)?.to_scalar()?)
        };
        let mut head = head(6)?;
        head.ids = vec![9; 6]; // No cluster: reading it in the first epoch would fail.
        let found = head.step(views, &PLACES, 0, WITH)?;
        assert_eq!(found.representation_loss.to_scalar::<f32>()?, loss(&found.ids, &head)?);
        let stored: Vec<u32> = PLACES.iter().map(|&place| head.ids[place]).collect();
        assert_eq!(stored, found.ids);
        assert_eq!(head.ids[3], 9, "an image of no batch");

        let turned: Vec<u32> = found.ids.iter().map(|id| (id + 1) % 3).collect();
        PLACES.iter().zip(&turned).for_each(|(&place, &id)| head.ids[place] = id);
        let found = head.step(views, &PLACES, 1, WITH)?;
        assert_eq!(found.representation_loss.to_scalar::<f32>()?, loss(&turned, &head)?);
        assert_ne!(found.ids, turned);
        let stored: Vec<u32> = PLACES.iter().map(|&place| head.ids[place]).collect();
        assert_eq!(stored, found.ids);
        Ok(())
    }

    #[test]
    fn images_are_assigned_by_the_mean_of_both_views() -> Result<()> {
        let mut head = SeCuHead::random(0, 2, 2, 1, SIZE, 7, &Cpu)?;
        // Of other lengths than 1, which must not count: by raw products the second would win.
        head.centres.variable.set(&Tensor::new(&[[0.5f32, 0.], [0., 2.]], &Cpu)?)?;
        // Similarities (1, 0) and (0.2, 0.98): the mean is (0.6, 0.49).
        let view_1 = Tensor::new(&[[1f32, 0.]], &Cpu)?;
        let view_2 = Tensor::new(&[[0.2f32, 0.98]], &Cpu)?;
        for views in [[&view_1, &view_2], [&view_2, &view_1]] {
            assert_eq!(head.step(views, &[0], 0, WITH)?.ids, [0]);
        }
        Ok(())
    }

    /// SeCu, case T11: centres twice and half as long change no loss and no cluster, and their gradients by one over
    /// the factor.
    #[test]
    fn the_length_of_a_centre_does_not_matter() -> Result<()> {
        let views = [view(1)?, view(2)?];
        let step = |factors: [f32; 3]| -> Result<(HeadStep, Vec<Vec<f32>>)> {
            let mut head = head(6)?;
            let factors = Tensor::new(&factors, &Cpu)?.reshape((3, 1))?;
            let scaled = head.centres.variable.broadcast_mul(&factors)?;
            head.centres.variable.set(&scaled)?;
            head.freeze()?;
            let found = head.step([&views[0], &views[1]], &PLACES, 0, WITH)?;
            let gradients = found.centre_loss.backward()?;
            let gradient = gradients.get(&head.centres.variable).expect("a gradient").to_vec2()?;
            Ok((found, gradient))
        };
        let factors = [2., 0.5, 3.];
        let ((plain, gradient), (scaled, scaled_gradient)) = (step([1., 1., 1.])?, step(factors)?);
        assert_eq!(plain.ids, scaled.ids);
        for (loss, scaled) in [
            (&plain.representation_loss, &scaled.representation_loss),
            (&plain.centre_loss, &scaled.centre_loss),
        ] {
            let (loss, scaled) = (loss.to_scalar::<f32>()?, scaled.to_scalar::<f32>()?);
            assert!((loss - scaled).abs() < 1e-5 * loss.abs(), "{loss}, {scaled}");
        }
        let rows = gradient.iter().zip(&scaled_gradient).zip(factors);
        for ((row, scaled), factor) in rows {
            for (x, y) in row.iter().zip(scaled) {
                assert!((x / factor - y).abs() < 1e-5, "{x} / {factor}, {y}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_largest_share_is_over_an_even_one() -> Result<()> {
        let mut head = head(6)?;
        head.ids = vec![0, 1, 1, 1, 1, 2];
        assert_eq!(head.largest_share()?, 2.);
        Ok(())
    }
}
