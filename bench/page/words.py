"""The prose of the page, between its tables and plots."""

from __future__ import annotations

INTRODUCTION = """# What the engine does, measured

A diffusion model makes an image in N denoising steps, each of which needs the one before, so a second device usually
does not make a single image any faster. This engine drafts the states of the next few steps, predicts their noise
concurrently on several devices, and refines them with the scheduler's own steps. Unless a table says otherwise, the
model is `shapes`, which comes with this project: small enough for processor cores, it draws 64×64 images of one or two
coloured shapes, so that a program can check whether an image matches its caption."""

TERMS = """## Modes and terms

The modes differ in how they draft and in what they accept:

- `sequential`: no drafts, one step after another; the reference for all other modes.
- `conservative`, `aggressive`: the two modes of the DRiffusion paper. The first evaluates the model afresh between two
  blocks of drafts and takes 2⌈N/(k+1)⌉ rounds or one fewer; the second continues from its drafts and takes
  1 + ⌈(N−1)/k⌉ rounds.
- `srds`: Parareal iterations over blocks of steps until the image changes by less than a tolerance.
- `adaptive`: accepts only drafts within a tolerance of the refined state.
- `speculative`: for schedulers that add noise; keeps drafts by chance, so that its images are distributed exactly as
  sequential ones are. The image of a seed is near the sequential one, but another.
- `auto`, the default: the fastest of `sequential`, `conservative` and `aggressive` with several k whose distance from
  the sequential images, calibrated once per model, is invisible or within a given tolerance.

Terms:

- A *lane* runs the model: a GPU, or here a processor core with an ONNX Runtime session of its own.
- A *draft* is a predicted future state; k is the number of drafts per round, by default the number of lanes.
- A *round* is one set of concurrent model calls. Sequential sampling takes N rounds, so N / rounds is the speed-up an
  algorithm allows if a call takes as long on all lanes at once as on one alone.
- *Guidance* is classifier-free guidance: two branches per step, with and without the prompt. They run *together* in one
  call or *split* over two lanes; the image is the same.
- Baselines: *one lane* is one ONNX Runtime session with one thread; *one session* is a single session with all cores,
  the usual alternative, and *openvino* the same with OpenVINO in fp32; *diffusers* is the diffusers pipeline in
  PyTorch, eager or *compiled* (`torch.compile`).
- *Drift* is the relative L2 distance of the final latents from the sequential ones with the same noise; 0 is the same
  image.
- p20, p50, … are percentiles. A range in brackets after a ratio is its 95 % bootstrap interval."""

RUN = """All rows of a table are interleaved image by image and start from the same noise. The columns with × give the
speed-up over each baseline. *Of N/rounds* is the speed-up over one lane as a share of what the algorithm allows;
splitting guidance can take it above 1. *Of the floor* is the time of the same model calls alone, replayed on the same
lanes with a barrier after each round, divided by the engine's time: 1 means no overhead. With this few images p99 is
close to the slowest image."""

ROUND = """The image with the median time, split into parts that add up to the whole; the tables above have the numbers.
*Model calls* is the longest call of each round. *Combine* is the linear combinations of latents; *copy* moves latents
to where calls and combinations read them; *wait* is the time to start lanes and to wait for the last one beyond its
call; *Python* is the rest: planning, binding calls, counting. *Device-seconds* are lanes times seconds: a faster image
on more devices still costs more of them."""

DEVICES = """Machines with more devices are simulated: each mode's real sequence of operations runs on a virtual clock.
The time of an evaluation (both branches of guidance) comes from the sources below; link latency and bandwidth are
typical values. The table assumes NVLink."""

VALIDATION = """On the lanes of this machine the prediction can be checked against measurement. The costs of calls,
combinations and launches are measured before and after every pass of images, and each image is predicted from the costs
around it. *Error* is the median of predicted / measured − 1 image by image; *measured* is the median time, and
*predicted* is that time with the error applied. On one lane k is 2."""

PAPER = """Here the only input to the prediction is the paper's sequential time, which cancels out of a speed-up. Beside
calls of 50 ms and more, combinations, launches and copies vanish, so the prediction is N/rounds in every row: this
comparison tests that the engine's round counts are those of the paper, not the cost model. The error is what the paper
lost beyond its rounds. Five points exceed what their round counts allow, SD 3's by 5 and 7 %: their baselines were
rounded, or timed differently."""

QUALITY = """The captions describe combinations that never occurred in training. An independent checker reads the image
back: *right* means that every attribute matches. Distance is the drift; 99 dB and an SSIM of 1 mean equal images. *As
in the paper* reuses one noise prediction for a whole block; *corrected* drafts mostly carry over the predicted image
instead, at the same cost; *fresh noise* draws other noise for drafts than for steps, as the paper's listing for
stochastic schedulers does. Fewer sequential steps are the usual alternative. The second row is the noise floor: the
same images with another batch size and lane count. Rows that begin with a scheduler are compared with that scheduler's
own sequential images, on fewer captions. `ddpm` and `euler_a` are the same sampler in two notations: at this model's
integer timesteps their coefficients are equal, and so are their rows."""

DRAFTS = """How far each mode ends from sequential with each kind of drafts: the drift with the paper's `frozen` drafts,
median and 90th percentile in brackets, and how many times closer another kind ends, median / 90th percentile. `frozen`
keeps the last noise prediction for a whole block and uses the model's prediction at a draft unchanged. `corrected`, the
default, mostly carries over the image predicted at a draft rather than its noise, at the same cost. The captions are
not those that the correction was tuned on."""

SPECULATIVE = """Mode `speculative` samples exactly the distribution of the sequential sampler; a kept draft saves a
round. A draft is kept with the chance 2Φ(−‖Δ‖/2), ‖Δ‖ being how far its mean is off in units of the step's noise;
*kept, by place in the round* is the mean of that chance. Latents of d numbers with the same error in each have ‖Δ‖ in
proportion to √d: the last columns simulate the rounds with what was measured here, scaled so. No coupling keeps more
drafts of the same means, neither a whitened one nor one per channel: 2Φ(−‖Δ‖/2) is 1 minus the total variation of the
two laws."""

ROBUSTNESS = """Mode `auto` plays a candidate if calibration says, from the spread of 16 images, that 99 % of images are
within the tolerance with 95 % confidence. Here every candidate it lets through draws other captions from other noise:
the share of those images within the tolerance, their 99th percentile and the worst as parts of it, and how many
candidates have fewer than nine of ten images within. `50 dB` is what holds without a tolerance. Settings without a plan
are sequential: guidance of 7.5 and 12 and short schedules are, mostly."""

CACHE = """A UNet exported in two parts (`make engines CACHE=1`) reuses the features of its deep part, as DeepCache
does, with a line through the last two that were computed. *One step of n whole* is the cache alone; with drafts,
either every second step has a deep part of its own, or only anchors have. Fewer steps are the alternative to all of
it. Drift is against 50 sequential steps; seconds were measured in turns, on one lane and on all. The last tables have
what drafts gain on one lane by the seconds of larger calls alone: DRiffusion evaluates the model N times in both
modes, so that 1.00 is the break-even, where a call's seconds are in proportion to its branches."""

SCENARIO = """Requests for images from fixed latents: one after another (*SingleStream*), with random arrivals
(*Server*), or all at once (*Offline*). **Unofficial**: not made by LoadGen, not verified by MLCommons, and with far
fewer requests than its rules require. *Valid* says whether a run this short would pass otherwise; quality is compared
with sequential images of the same latents."""

SERVE = """Closed-loop clients over HTTP: each sends its next request when it has the last image. *Batched* deals
the rounds of all running requests over the lanes, in calls that they share; *elastic* gives a lone request all lanes
and concurrent requests fewer each; the others give every image all lanes, or one lane. The policies take turns within
one server. *× the better* is the throughput, median latency and 95th percentile of the first policy, each divided by
that of the best of the others."""

FLEET = """Replicas of one to eight H100s make SDXL images of 30 steps behind a router that sends each request to the
less loaded of two replicas, taken at random. The rules for lanes are the server's own; call times are two published
points and a line through them, and a GPU costs what is assumed. A cell has the fewest GPUs in all that keep the limit
of the 99th percentile, dollars per thousand images, p50 and p99; – where not even an empty fleet keeps it. A replica of
one GPU costs little more where the limit leaves time to wait; where it is near the time of one image, one GPU per image
must idle, while a replica of several gives all of them to whoever is alone. *Batched* lets requests share calls, which
processor lanes do today and GPUs do not. The *day* swings by 80 % about the mean and is served by a fleet that does not
grow. When a zone is lost, a third of the replicas is gone at once and what they had is begun anew elsewhere."""

LOADTEST = """The application on a Ray cluster of one node, with one replica of two lanes, under open-loop load:
requests are sent when they are due, and every image is compared with the one that the same fields give without a
cluster. *Added* is the time of a lone request to the cluster less that of the same request to a single server on the
same cores, in turns."""

KSERVE = """A client in a process of its own asks for 512² pixels of a model of which nothing is computed, in turns with
calls in the server's process. *Added* is the time of a request over the median of these calls: KServe v2 with the
pixels in system shared memory, as binary data over HTTP and as raw contents over gRPC, beside a PNG in OpenAI's JSON,
which is decoded. The other client asks for images of 20 steps, one after the other, from a third process."""

EXPORT = """Architectures of published checkpoints with random weights, because weights could not be downloaded. Each
network is exported to ONNX by itself and compared with PyTorch, as in every export. *Difference to torch* is the
largest absolute difference over the largest value, at the smallest sizes of the exported range, which take the least
time. TensorRT-RTX plans are built ahead of time for a GPU that need not be present; none has run."""

CALLS = """One call of the denoiser on one thread, in turns, by the number of its rows, and how many times faster than
ONNX Runtime with dynamic shapes, which is what its lanes use. *Static* means that a session knows all sizes. Lanes of
OpenVINO use static shapes, in fp32 or, when asked, bf16. int8 is an experiment: NNCF's quantization of weights and
activations, calibrated on other captions. *Error* is the largest difference of an output, by its scale."""

KERNEL = """Guidance, k scheduler steps and k drafts are one linear combination, made in one pass over the latents. The
alternatives are the same arithmetic as separate operations, for latents of four sizes, and a plain copy of as many
bytes. On processor cores this is the NumPy version that CPU lanes use, on one thread; its cost grows with inputs times
outputs, so for large latents and many drafts separate operations are cheaper there."""

EMBED = """`libdriffusion` plays the same sampler without Python in the process, on the same two lanes, in turns with
the Python engine. The machine was busy during this run, so the ratios count and the seconds do not."""

HOST = """What Python and the driver's functions cost per round of a captured program, on a stand-in of the driver whose
functions do nothing, before and after programs were found by identity; and how many rounds, graphs and contexts 140
mixed images leave. No GPU is involved."""

NO_GPU = """No GPU run has been committed yet: `make gpu-check` makes one on any NVIDIA machine."""

AGAIN = """## Reproduce

```
{commands}
```

Each command writes the files named beside it and leaves the others as they were. `python -m bench` lists all commands;
`bench/README.md` describes the files, each of which names the commit that was measured."""
