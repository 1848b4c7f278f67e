// A program file in memory, checked: PROGRAM.md has the format. Nothing here can be out of range afterwards.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sha256.h"

namespace driffusion {

using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

// Records as they lie in the file; the file is little-endian and so must be the machine (checked when it is read).
struct Model {
    u32 model, source, scheduler, mode, drafts, runtime, steps, k, guidance_kind, flags, width, height, channels, latent_height, latent_width;
    u32 lanes, threads, clip_skip;
    double guidance, start_scale, start_alpha, start_sigma, pixel_scale, pixel_shift;
};
struct Step {
    double timestep, alpha, sigma;
};
enum class SlotKind : u32 { State, Latent, Output, Noise };
struct Slot {
    u32 name;
    SlotKind kind;
    u32 number, reserved;
};
constexpr u32 PREDICT = 1, COMBINE = 2;
struct Operation {
    u32 kind, first, size, targets_first, targets_size, finished;
    u64 coefficient;
};
struct Evaluation {
    u32 latent, step, output;
};
enum class Role : u32 { TextEncoder = 1, Denoiser, VaeDecoder };
struct Network {
    Role role;
    u32 name, first_tensor, inputs, outputs, first_file, files, reserved;
};
enum class Source : u32 { Made, Sample, Timestep, Encoded, TimeIds, Guidance, Tokens, ClipSkip };
constexpr u32 FLOAT32 = 1, INT64 = 7;
struct Tensor {
    u32 name, dtype;
    Source source;
    u32 number, rank, reserved;
    i64 dims[6];
    u64 row() const {  // elements of one row of the batch
        u64 size = 1;
        for (u32 axis = 1; axis < rank; ++axis) size *= u64(dims[axis]);
        return size;
    }
};
enum class FileKind : u32 { Onnx = 1, Weights, Compiled, CompiledWeights, Tokenizer };
struct File {
    u32 name;
    FileKind kind;
    u32 machine, runtime;
    u64 size;
    Digest sha256;
};
struct TokenizerSpec {
    u32 file, max_length;
    i64 pad_id, end_id;
};
struct Cost {
    u32 branches, reserved;
    double seconds;
};
constexpr u32 NO_GUIDANCE = 0, CLASSIFIER_FREE = 1, EMBEDDED = 2, ZERO_NEGATIVE = 1;

class Program {
   public:
    // Error with VERSION or PROGRAM for anything that no writer of this version makes.
    static Program parse(std::string_view content);

    const char *string(u32 offset) const { return text.c_str() + offset; }
    const Network &network(Role role) const { return networks[u32(role) - 1]; }
    u64 latent_elements() const { return u64(model.channels) * model.latent_height * model.latent_width; }
    u32 noise_slots() const;
    u32 rounds() const;

    std::string text;
    Model model;
    std::vector<Step> steps;
    std::vector<Slot> slots;
    std::vector<Operation> operations;
    std::vector<Evaluation> evaluations;
    std::vector<u32> references;
    std::vector<double> coefficients;
    std::vector<Network> networks;
    std::vector<Tensor> tensors;
    std::vector<File> files;
    std::vector<TokenizerSpec> tokenizers;
    std::vector<Cost> costs;

   private:
    bool has_text(u32 offset) const;
    void check_model() const;
    void check_networks() const;
    void check_files(u32 of_networks) const;
    void check_tensors(const Network &network) const;
    void check_operations() const;
    void check_predict(const Operation &operation, std::vector<bool> &written) const;
    void check_combine(const Operation &operation, std::vector<bool> &written) const;
};

bool valid_utf8(std::string_view text);

}  // namespace driffusion
