//! The heads: several sets of centres over one network, each with the clusters it gave its images.

use anyhow::{Context, Result, ensure};
use backbone::network_file::NamedTensor;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rand_distr::{Distribution, StandardNormal};
use stage::container::Container;
use training::Run;
use training::ops::unit_rows;

use crate::constraint::{Balance, Before, Constraint};
use crate::loss::{centre_loss, representation_loss};

/// One head of `K` clusters.
#[derive(Debug)]
pub struct Head {
    /// Name in files: `heads.<number>`.
    name: String,
    /// The raw centres, `(K, P)`: their lengths mean nothing, but the gradient shrinks with them.
    centres: Var,
    momentum: Tensor,
    /// The unit-length centres as they were when the epoch began, `(K, P)`: constants.
    frozen: Tensor,
    balance: Balance,
    /// Cluster of each image that is trained on.
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

/// What one step of a head finds.
#[derive(Debug)]
pub struct Found {
    /// Reaches the network alone.
    pub representation_loss: Tensor,
    /// Reaches the centres alone.
    pub centre_loss: Tensor,
    /// The new clusters of the batch.
    pub ids: Vec<u32>,
}

/// SGD of the centres: `b ← μ b + (g + λ w)`, `w ← w − η b`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// η, constant over the run.
    pub learning_rate: f64,
    /// μ.
    pub momentum: f64,
    /// λ.
    pub weight_decay: f64,
}

impl Head {
    /// Head `number` with centres in random directions, of unit length.
    ///
    /// - `images`: number of images that are trained on.
    ///
    /// # Errors
    ///
    /// The device refuses.
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
        Ok(Self {
            name: format!("heads.{number}"),
            momentum: centres.zeros_like()?,
            frozen: centres.clone(),
            centres: Var::from_tensor(&centres)?,
            balance: Balance::new(constraint, clusters),
            // Never read before they are written: the first epoch trains on its own ids.
            ids: vec![0; images],
        })
    }

    /// Number of clusters `K`.
    pub fn clusters(&self) -> usize {
        self.balance.values().len()
    }

    /// The unit-length centres as they are now, `(K, P)`; the gradient passes.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn directions(&self) -> candle_core::Result<Tensor> {
        unit_rows(&self.centres)
    }

    /// Takes the copy of the centres that the network sees during this epoch.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn freeze(&mut self) -> Result<()> {
        self.frozen = self.directions()?.detach();
        Ok(())
    }

    /// One step: assigns the batch, exchanges its stored clusters, and compares.
    ///
    /// The images are assigned by the *current* centres. The network learns toward the clusters of
    /// the epoch before, which are read before the new ones are stored; in the first epoch toward
    /// the new ones.
    ///
    /// - `directions`: unit-length projections of view 1 and 2, `(B, P)`.
    /// - `places`: of the images of the batch among those that are trained on.
    /// - `epoch`: from 0.
    ///
    /// # Errors
    ///
    /// The shapes do not fit.
    pub fn step(
        &mut self,
        [view_1, view_2]: [&Tensor; 2],
        places: &[usize],
        epoch: usize,
        with: Temperatures,
    ) -> Result<Found> {
        // The centres' side: the projections are constants.
        let centres = self.directions()?.t()?;
        let similarity_1 = view_1.detach().matmul(&centres)?;
        let similarity_2 = view_2.detach().matmul(&centres)?;
        let mean = ((&similarity_1 + &similarity_2)?.detach() * 0.5)?;
        let mean = mean.flatten_all()?.to_vec1::<f32>()?;

        let before: Vec<u32> = places.iter().map(|&place| self.ids[place]).collect();
        let ids = match epoch {
            0 => self.balance.assign(&mean, Before::Nothing),
            _ => {
                let images = self.ids.len();
                self.balance.assign(&mean, Before::Assigned { ids: &before, images })
            }
        };
        places.iter().zip(&ids).for_each(|(&place, &id)| self.ids[place] = id);

        let device = view_1.device();
        let now = Tensor::new(ids.as_slice(), device)?;
        let loss_1 = centre_loss(&similarity_1, &now, with.centres)?;
        let loss_2 = centre_loss(&similarity_2, &now, with.centres)?;

        // The network's side: the centres are those of the epoch's beginning.
        let toward = if epoch == 0 { now } else { Tensor::new(before.as_slice(), device)? };
        let frozen = self.frozen.t()?;
        let logits_1 = (view_1.matmul(&frozen)? / with.network)?;
        let logits_2 = (view_2.matmul(&frozen)? / with.network)?;
        Ok(Found {
            representation_loss: representation_loss(
                [&logits_1, &logits_2],
                &toward,
                with.assigned_share,
            )?,
            centre_loss: ((loss_1 + loss_2)? * 0.5)?,
            ids,
        })
    }

    /// Moves the centres along their gradient; without one, momentum and decay still act.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn descend(&mut self, gradients: &GradStore, rule: Rule) -> Result<()> {
        let centres = self.centres.as_detached_tensor();
        let decay = (&centres * rule.weight_decay)?;
        let gradient = match gradients.get(&self.centres) {
            Some(gradient) => (gradient + decay)?,
            None => decay,
        };
        self.momentum = ((&self.momentum * rule.momentum)? + gradient)?.detach();
        Ok(self.centres.set(&(centres - (&self.momentum * rule.learning_rate)?)?)?)
    }

    /// Whether a gradient of the centres is not finite: then their name.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn not_finite(&self, gradients: &GradStore) -> Result<Option<String>> {
        let Some(gradient) = gradients.get(&self.centres) else { return Ok(None) };
        let sum = gradient.abs()?.sum_all()?.to_scalar::<f32>()?;
        Ok((!sum.is_finite()).then(|| format!("{}.centres", self.name)))
    }

    /// Images of each cluster, as the clusters are stored, the largest share over its even one.
    pub fn largest_share(&self) -> f64 {
        let mut sizes = vec![0usize; self.clusters()];
        self.ids.iter().for_each(|&id| sizes[id as usize] += 1);
        let largest = sizes.into_iter().max().unwrap_or(0);
        largest as f64 * self.clusters() as f64 / self.ids.len().max(1) as f64
    }

    /// Keeps in the state of `run` what the network file does not hold.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn keep(&self, run: &mut Run) -> Result<()> {
        let ids = self.ids.iter().map(|&id| id as f32).collect();
        run.keep(&format!("{}.ids", self.name), &[self.ids.len()], ids);
        let balance = self.balance.values().to_vec();
        run.keep(&format!("{}.balance", self.name), &[balance.len()], balance);
        let frozen = self.frozen.flatten_all()?.to_vec1()?;
        run.keep(&format!("{}.frozen", self.name), self.frozen.dims(), frozen);
        Ok(())
    }

    /// Takes up what an earlier part of the run has kept; nothing when this is its beginning.
    ///
    /// # Errors
    ///
    /// It is of other heads or images.
    pub fn take_up(&mut self, run: &Run) -> Result<()> {
        let kept = |what: &str| run.kept(&format!("{}.{what}", self.name));
        let Some(ids) = kept("ids") else { return Ok(()) };
        let lacks = "the state of this run lacks a part of its heads; remove its folder";
        ensure!(ids.len() == self.ids.len(), "{lacks}");
        let (balance, frozen) = (kept("balance").context(lacks)?, kept("frozen").context(lacks)?);
        let frozen = Tensor::from_slice(frozen, self.frozen.shape(), self.frozen.device())?;
        let ids = ids.iter().map(|&id| id as u32).collect();
        self.balance.set(balance)?;
        (self.frozen, self.ids) = (frozen, ids);
        Ok(())
    }

    /// The raw centres, for `network.safetensors`.
    pub(crate) fn variable(&self) -> Result<NamedTensor> {
        Self::named(format!("{}.centres", self.name), &self.centres)
    }

    /// Their momentum, for the state.
    pub(crate) fn memory(&self) -> Result<NamedTensor> {
        Self::named(format!("momenta.{}.centres", self.name), &self.momentum)
    }

    fn named(name: String, tensor: &Tensor) -> Result<NamedTensor> {
        let values = tensor.flatten_all()?.to_vec1()?;
        Ok(NamedTensor { name, shape: tensor.dims().to_vec(), values })
    }

    pub(crate) fn take_up_variable(&mut self, network: &Container) -> Result<()> {
        let centres = read(network, &format!("{}.centres", self.name), &self.centres)?;
        Ok(self.centres.set(&centres)?)
    }

    pub(crate) fn take_up_memory(&mut self, state: &Container) -> Result<()> {
        self.momentum = read(state, &format!("momenta.{}.centres", self.name), &self.momentum)?;
        Ok(())
    }
}

fn read(file: &Container, name: &str, like: &Tensor) -> Result<Tensor> {
    let shape = file.shape(name)?;
    ensure!(
        shape == like.dims(),
        "tensor `{name}` of `{}` is {shape:?}, but the experiment's head is {:?}; remove the folder",
        file.path().display(),
        like.dims()
    );
    Ok(Tensor::from_vec(file.f32(name)?, shape, like.device())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    const SIZE: Constraint = Constraint::Size { lower_bound: 0.9, rate: 0.1 };
    const WITH: Temperatures = Temperatures { network: 0.05, centres: 0.05, assigned_share: 0.2 };

    fn head(images: usize) -> Result<Head> {
        Head::random(0, 3, 4, images, SIZE, 7, &Cpu)
    }

    /// Unit-length projections of a view, by number.
    fn view(number: u64) -> Result<Tensor> {
        let values = training::noise(1., (5, 4), number, &[], &Cpu)?;
        Ok(unit_rows(&values.context("a deviation above 0")?)?)
    }

    const PLACES: [usize; 5] = [4, 0, 2, 5, 1];

    #[test]
    fn centres_begin_at_unit_length_in_directions_of_their_seed() -> Result<()> {
        let lengths = head(6)?.centres.sqr()?.sum(1)?.to_vec1::<f32>()?;
        assert!(lengths.iter().all(|length| (length - 1.).abs() < 1e-6), "{lengths:?}");
        let values = |head: Head| head.centres.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(head(6)?)?, values(head(6)?)?);
        assert_ne!(values(head(6)?)?, values(Head::random(1, 3, 4, 6, SIZE, 7, &Cpu)?)?);
        assert_ne!(values(head(6)?)?, values(Head::random(0, 3, 4, 6, SIZE, 8, &Cpu)?)?);
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
            assert!(of_centres.get(&head.centres).is_some());
            assert!(of_centres.get(&view_1).is_none() && of_centres.get(&view_2).is_none());
            let of_network = found.representation_loss.backward()?;
            assert!(of_network.get(&head.centres).is_none());
            assert!(of_network.get(&view_1).is_some() && of_network.get(&view_2).is_some());
        }
        Ok(())
    }

    /// SeCu, case T14, and gotcha 4.
    #[test]
    fn the_network_sees_the_centres_of_the_epochs_beginning() -> Result<()> {
        let views = [view(1)?, view(2)?];
        let loss = |head: &mut Head| -> Result<f32> {
            let found = head.step([&views[0], &views[1]], &PLACES, 1, WITH)?;
            Ok(found.representation_loss.to_scalar()?)
        };
        let mut moved = head(6)?;
        let other = Head::random(3, 3, 4, 6, SIZE, 7, &Cpu)?;
        moved.centres.set(&other.centres)?;
        let want = loss(&mut head(6)?)?;
        assert_eq!(loss(&mut moved)?, want);
        let mut frozen_anew = head(6)?;
        frozen_anew.centres.set(&other.centres)?;
        frozen_anew.freeze()?;
        assert_ne!(loss(&mut frozen_anew)?, want);
        Ok(())
    }

    /// Gotcha 3 of the specification: what is read, and when it is written.
    #[test]
    fn the_first_epoch_trains_on_its_own_ids_and_later_ones_on_those_before() -> Result<()> {
        let views = [view(1)?, view(2)?];
        let views = [&views[0], &views[1]];
        let loss = |ids: &[u32], head: &Head| -> Result<f32> {
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
        let mut head = Head::random(0, 2, 2, 1, SIZE, 7, &Cpu)?;
        head.centres.set(&Tensor::new(&[[2f32, 0.], [0., 0.5]], &Cpu)?)?;
        // Similarities (1, 0) and (0.2, 0.98): the mean is (0.6, 0.49).
        let view_1 = Tensor::new(&[[1f32, 0.]], &Cpu)?;
        let view_2 = Tensor::new(&[[0.2f32, 0.98]], &Cpu)?;
        for views in [[&view_1, &view_2], [&view_2, &view_1]] {
            assert_eq!(head.step(views, &[0], 0, WITH)?.ids, [0]);
        }
        Ok(())
    }

    /// SeCu, case T10.
    #[test]
    fn a_rate_of_zero_moves_nothing_but_gathers_momentum() -> Result<()> {
        let mut head = head(6)?;
        let before = head.centres.to_vec2::<f32>()?;
        let gradients = head.centres.sum_all()?.backward()?; // A gradient of 1.
        let rule = Rule { learning_rate: 0., momentum: 0.9, weight_decay: 0. };
        for _ in 0..391 {
            head.descend(&gradients, rule)?;
        }
        assert_eq!(head.centres.to_vec2::<f32>()?, before);
        for momentum in head.momentum.flatten_all()?.to_vec1::<f32>()? {
            assert!((momentum - 10.).abs() < 1e-4, "{momentum}");
        }
        Ok(())
    }

    #[test]
    fn centres_follow_the_rule_with_and_without_a_gradient() -> Result<()> {
        let mut head = head(6)?;
        let at = head.centres.to_vec2::<f32>()?[0][0];
        let rule = Rule { learning_rate: 0.5, momentum: 0.9, weight_decay: 0.1 };
        let gradients = (head.centres.sum_all()? * 3.)?.backward()?;
        head.descend(&gradients, rule)?;
        let momentum = 3. + 0.1 * at;
        let moved = at - 0.5 * momentum;
        assert!((head.centres.to_vec2::<f32>()?[0][0] - moved).abs() < 1e-6);
        let none = Tensor::zeros((), candle_core::DType::F32, &Cpu)?.backward()?;
        head.descend(&none, rule)?;
        let want = moved - 0.5 * (0.9 * momentum + 0.1 * moved);
        assert!((head.centres.to_vec2::<f32>()?[0][0] - want).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn the_largest_share_is_over_an_even_one() -> Result<()> {
        let mut head = head(6)?;
        head.ids = vec![0, 1, 1, 1, 1, 2];
        assert_eq!(head.largest_share(), 2.);
        Ok(())
    }
}
