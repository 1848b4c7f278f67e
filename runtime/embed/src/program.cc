#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "error.h"

namespace driffusion {
namespace {

constexpr u32 VERSION = 1, SECTIONS = 13;
constexpr std::size_t HEADER = 64, ENTRY = 24, MOST_BYTES = std::size_t(1) << 28;

void expect(bool true_, const char *message) {
    if (!true_) fail(DRIFFUSION_ERROR_PROGRAM, std::string("the program file is damaged: ") + message);
}

template <typename T>
T load(const char *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Walks the table of sections: each one must stand where the one before it ends, at the next multiple of 8.
class Sections {
   public:
    explicit Sections(std::string_view content) : content_(content), end_(HEADER + ENTRY * SECTIONS) {
        expect(end_ <= content.size(), "the table of sections is cut");
    }

    template <typename T>
    std::vector<T> next() {
        auto [data, count] = take(sizeof(T));
        std::vector<T> records(count);
        if (count) std::memcpy(records.data(), data, count * sizeof(T));
        return records;
    }

    std::string text() {
        auto [data, count] = take(1);
        return std::string(data, count);
    }

    void finish() const { expect(end_ == content_.size(), "there is something after the last section"); }

   private:
    std::pair<const char *, std::size_t> take(std::size_t record) {
        const char *entry = content_.data() + HEADER + ENTRY * number_++;
        std::size_t padded = (end_ + 7) / 8 * 8;
        auto offset = load<u64>(entry + 8), count = load<u64>(entry + 16);
        expect(load<u32>(entry) == number_ && load<u32>(entry + 4) == record && offset == padded, "a section is not where it should be");
        expect(padded <= content_.size() && count <= (content_.size() - padded) / record, "a section is cut");
        for (; end_ < padded; ++end_) expect(!content_[end_], "a section is cut");
        end_ = padded + count * record;
        return {content_.data() + padded, count};
    }

    std::string_view content_;
    std::size_t end_;
    u32 number_ = 0;
};

static_assert(sizeof(Model) == 120 && sizeof(Step) == 24 && sizeof(Slot) == 16 && sizeof(Operation) == 32 && sizeof(Evaluation) == 12);
static_assert(sizeof(Network) == 32 && sizeof(Tensor) == 72 && sizeof(File) == 56 && sizeof(TokenizerSpec) == 24 && sizeof(Cost) == 16);

template <typename T>
bool distinct(const T *first, std::size_t count) {
    return std::set<T>(first, first + count).size() == count;
}

bool good_path(std::string_view name) {
    if (name.empty() || name.size() > 1024 || name.find('\\') != name.npos) return false;
    for (std::size_t start = 0; start <= name.size();) {
        std::size_t end = std::min(name.find('/', start), name.size());
        std::string_view part = name.substr(start, end - start);
        if (part.empty() || part == "." || part == "..") return false;
        start = end + 1;
    }
    return true;
}

}  // namespace

bool valid_utf8(std::string_view text) {
    for (std::size_t i = 0; i < text.size();) {
        auto first = static_cast<unsigned char>(text[i]);
        int more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : -1;
        if (more < 0 || i + std::size_t(more) >= text.size()) return false;
        u32 code = more == 0 ? first : first & (0x3fu >> more);
        for (int n = 1; n <= more; ++n) {
            auto byte = static_cast<unsigned char>(text[i + std::size_t(n)]);
            if (byte >> 6 != 2) return false;
            code = code << 6 | (byte & 0x3f);
        }
        static const u32 least[] = {0, 0x80, 0x800, 0x10000};
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
        i += std::size_t(more) + 1;
    }
    return true;
}

Program Program::parse(std::string_view content) {
    const u32 one = 1;
    if (!load<char>(reinterpret_cast<const char *>(&one))) fail(DRIFFUSION_ERROR_UNSUPPORTED, "program files are for little-endian machines");
    if (content.size() < HEADER || content.substr(0, 8) != "DRIFPROG") fail(DRIFFUSION_ERROR_PROGRAM, "this is no program file");
    auto version = load<u32>(content.data() + 8);
    if (version != VERSION) {
        fail(DRIFFUSION_ERROR_VERSION, "the program has version " + std::to_string(version) + ", this library knows " + std::to_string(VERSION) + ": write it again");
    }
    expect(load<u64>(content.data() + 16) == content.size() && content.size() <= MOST_BYTES, "its size is not what it says");
    Digest digest = sha256(content.data() + HEADER, content.size() - HEADER);
    expect(!std::memcmp(digest.data(), content.data() + 32, digest.size()), "the checksum differs: it was altered");
    expect(load<u32>(content.data() + 12) == SECTIONS && !load<u64>(content.data() + 24), "the header is not that of this version");
    Sections sections(content);
    Program program;
    program.text = sections.text();
    auto models = sections.next<Model>();
    program.steps = sections.next<Step>();
    program.slots = sections.next<Slot>();
    program.operations = sections.next<Operation>();
    program.evaluations = sections.next<Evaluation>();
    program.references = sections.next<u32>();
    program.coefficients = sections.next<double>();
    program.networks = sections.next<Network>();
    program.tensors = sections.next<Tensor>();
    program.files = sections.next<File>();
    program.tokenizers = sections.next<TokenizerSpec>();
    program.costs = sections.next<Cost>();
    sections.finish();
    expect(!program.text.empty() && !program.text.front() && !program.text.back(), "the texts have no end");
    expect(valid_utf8(program.text), "the texts are not UTF-8");
    expect(models.size() == 1, "there must be one model");
    program.model = models[0];
    program.check_model();
    program.check_networks();
    program.check_operations();
    return program;
}

// a text begins there: an offset within a text may be within a character
bool Program::has_text(u32 offset) const {
    return offset < text.size() && (!offset || !text[offset - 1]);
}

u32 Program::noise_slots() const {
    return u32(std::count_if(slots.begin(), slots.end(), [](const Slot &slot) { return slot.kind == SlotKind::Noise; }));
}

u32 Program::rounds() const {
    return u32(std::count_if(operations.begin(), operations.end(), [](const Operation &one) { return one.kind == PREDICT; }));
}

void Program::check_model() const {
    for (u32 offset : {model.model, model.source, model.scheduler, model.mode, model.drafts, model.runtime}) {
        expect(has_text(offset), "a text of the model is outside");
    }
    expect(model.steps >= 1 && model.steps == steps.size() && model.steps <= 100000, "the number of steps differs");
    expect(model.k >= 1 && model.k <= 1000 && model.guidance_kind <= EMBEDDED && model.flags <= ZERO_NEGATIVE, "k, guidance or flags");
    for (u32 side : {model.width, model.height, model.channels, model.latent_height, model.latent_width}) {
        expect(side >= 1 && side <= 1u << 16, "a size is out of range");
    }
    expect(model.lanes >= 1 && model.lanes <= 64 && model.threads <= 1024 && model.clip_skip <= 64, "lanes, threads or clip_skip");
    for (double value : {model.guidance, model.start_scale, model.start_alpha, model.start_sigma, model.pixel_scale, model.pixel_shift}) {
        expect(std::isfinite(value), "a number is not finite");
    }
    for (const Step &step : steps) {
        expect(std::isfinite(step.timestep) && std::isfinite(step.alpha) && std::isfinite(step.sigma), "a number is not finite");
    }
    for (double value : coefficients) expect(std::isfinite(value), "a number is not finite");
    u32 before = 0;
    for (const Cost &cost : costs) {
        expect(cost.branches > before && cost.branches <= 1u << 16, "the costs are not in order");
        expect(!cost.reserved && cost.seconds > 0 && std::isfinite(cost.seconds), "a cost is not a positive number");
        before = cost.branches;
    }
}

void Program::check_networks() const {
    expect(networks.size() == 3, "text encoder, denoiser, VAE decoder are needed");
    u64 tensor = 0, file = 0;
    for (u32 number = 0; number < 3; ++number) {
        const Network &one = networks[number];
        expect(one.role == Role(number + 1), "text encoder, denoiser, VAE decoder are needed");
        expect(one.first_tensor == tensor && one.first_file == file && !one.reserved, "networks overlap");
        for (u32 count : {one.inputs, one.outputs, one.files}) expect(count >= 1 && count <= 64, "a network without tensors or files");
        expect(has_text(one.name), "the name of a network is outside");
        tensor += one.inputs + one.outputs, file += one.files;
        expect(tensor <= tensors.size() && file <= files.size(), "tensors or files are missing");
        u32 kinds[6] = {};
        for (u32 n = one.first_file; n < file; ++n) {
            u32 kind = u32(files[n].kind);
            expect(kind >= 1 && kind <= u32(FileKind::CompiledWeights), "files of a network");
            expect(++kinds[kind] == 1, "two files of one kind");
        }
        expect(kinds[1] == 1, "files of a network");
        expect(kinds[3] || !kinds[4], "compiled weights without a compiled network");
    }
    expect(tensor == tensors.size() && file + tokenizers.size() == files.size(), "tensors or files are left over");
    check_files(u32(file));
    for (const Network &one : networks) check_tensors(one);
}

void Program::check_files(u32 of_networks) const {
    for (u32 number = 0; number < files.size(); ++number) {
        const File &one = files[number];
        for (u32 offset : {one.name, one.machine, one.runtime}) expect(has_text(offset), "the text of a file is outside");
        expect(good_path(string(one.name)), "the name of a file");
        expect(number < of_networks || one.kind == FileKind::Tokenizer, "the kind of a file");
        expect(one.size < u64(1) << 48, "the size of a file");
    }
    for (u32 number = 0; number < tokenizers.size(); ++number) {
        const TokenizerSpec &spec = tokenizers[number];
        expect(spec.file == of_networks + number && spec.max_length >= 2 && spec.max_length <= 1u << 16, "a tokenizer");
        for (i64 id : {spec.pad_id, spec.end_id}) expect(id >= 0 && id < i64(1) << 31, "an id of a tokenizer");
    }
}

void Program::check_tensors(const Network &network) const {
    const Network &encoder = networks[0];
    const Tensor *made = &tensors[encoder.first_tensor] + encoder.inputs;
    auto has_shape = [](const Tensor &tensor, const std::vector<i64> &shape) {
        return tensor.rank == shape.size() && std::equal(shape.begin(), shape.end(), tensor.dims);
    };
    const std::vector<i64> latent = {-1, model.channels, model.latent_height, model.latent_width};
    std::set<std::pair<Source, u32>> sources;
    for (u32 n = 0; n < network.inputs + network.outputs; ++n) {
        const Tensor &tensor = tensors[network.first_tensor + n];
        expect(tensor.name > 0 && has_text(tensor.name) && !tensor.reserved, "the name of a tensor");
        expect(tensor.rank >= 1 && tensor.rank <= 6 && tensor.dims[0] == -1, "a tensor without a batch");
        u64 elements = 1;
        for (u32 axis = 1; axis < 6; ++axis) {
            i64 size = tensor.dims[axis];
            expect(axis < tensor.rank ? size >= 1 && size <= 1 << 24 : !size, "a dimension is out of range");
            if (axis < tensor.rank) elements *= u64(size);
            expect(elements <= u64(1) << 28, "a tensor is too large");
        }
        if (n >= network.inputs) {
            expect(tensor.source == Source::Made && !tensor.number && tensor.dtype == FLOAT32, "the type of an output");
            continue;
        }
        expect(sources.insert({tensor.source, tensor.number}).second, "an input is there twice");
        bool whole = tensor.source == Source::Tokens || tensor.source == Source::ClipSkip;
        expect(tensor.dtype == (whole ? INT64 : FLOAT32), "the type of an input");
        bool encoder_input = tensor.source == Source::Tokens || tensor.source == Source::ClipSkip;
        bool denoiser_input = u32(tensor.source) >= u32(Source::Sample) && u32(tensor.source) <= u32(Source::Guidance);
        bool allowed = network.role == Role::TextEncoder ? encoder_input : network.role == Role::Denoiser ? denoiser_input : tensor.source == Source::Sample;
        expect(allowed, "an input of the wrong kind");
        std::vector<i64> wanted = {-1};
        if (tensor.source == Source::Tokens) {
            expect(tensor.number < tokenizers.size(), "an input for a tokenizer that is not there");
            wanted.push_back(tokenizers[tensor.number].max_length);
        } else if (tensor.source == Source::Encoded) {
            expect(tensor.number < encoder.outputs, "an input for an output that is not there");
            wanted.assign(made[tensor.number].dims, made[tensor.number].dims + std::min(made[tensor.number].rank, 6u));
        } else {
            expect(!tensor.number, "the shape of an input");
            if (tensor.source == Source::Sample) wanted = latent;
            if (tensor.source == Source::TimeIds) wanted.push_back(6);
        }
        expect(has_shape(tensor, wanted), "the shape of an input");
    }
    if (network.role == Role::TextEncoder) return;
    expect(sources.count({Source::Sample, 0}), "an input is missing");
    expect(network.role == Role::VaeDecoder || sources.count({Source::Timestep, 0}), "an input is missing");
    expect(network.outputs == 1, "one output is needed");
    const std::vector<i64> image = {-1, 3, model.height, model.width};
    expect(has_shape(tensors[network.first_tensor + network.inputs], network.role == Role::Denoiser ? latent : image), "the shape of an output");
}

void Program::check_operations() const {
    expect(!slots.empty() && slots.size() <= 1u << 16, "slots");
    std::vector<bool> written(slots.size());
    for (u32 number = 0; number < slots.size(); ++number) {
        const Slot &slot = slots[number];
        expect(has_text(slot.name) && u32(slot.kind) <= u32(SlotKind::Noise) && !slot.reserved, "a slot");
        expect((slot.number > 0) == (slot.kind == SlotKind::Noise), "the number of a slot");
        expect((slot.kind == SlotKind::State) == (number == 0), "slots");
        written[number] = slot.kind == SlotKind::State || slot.kind == SlotKind::Noise;
    }
    u64 evaluation = 0, reference = 0, coefficient = 0;
    u32 finished = 0;
    for (const Operation &one : operations) {
        if (one.kind == PREDICT) {
            expect(one.first == evaluation && one.size >= 1 && one.size <= 4096, "evaluations overlap");
            evaluation += one.size;
            expect(evaluation <= evaluations.size(), "evaluations are missing");
            check_predict(one, written);
            continue;
        }
        expect(one.kind == COMBINE, "an operation of an unknown kind");
        expect(one.size >= 1 && one.size <= 4096 && one.targets_size >= 1 && one.targets_size <= 4096, "a combination without slots");
        expect(one.first == reference && one.targets_first == reference + one.size, "references overlap");
        reference += u64(one.size) + one.targets_size;
        expect(reference <= references.size() && one.coefficient == coefficient, "references are missing");
        coefficient += u64(one.size) * one.targets_size;
        expect(coefficient <= coefficients.size(), "coefficients are missing");
        expect(one.finished <= model.steps, "more steps are finished than there are");
        finished = one.finished;
        check_combine(one, written);
    }
    expect(finished == model.steps && operations.back().kind == COMBINE, "the program ends before its last step");
    expect(evaluation == evaluations.size() && reference == references.size() && coefficient == coefficients.size(), "something is left over");
}

void Program::check_predict(const Operation &operation, std::vector<bool> &written) const {
    expect(!operation.targets_first && !operation.targets_size && !operation.finished && !operation.coefficient, "a round has no targets");
    std::set<u32> outputs;
    for (u32 n = 0; n < operation.size; ++n) {
        const Evaluation &one = evaluations[operation.first + n];
        expect(one.latent < slots.size() && written[one.latent] && slots[one.latent].kind != SlotKind::Output, "an evaluation reads a slot before it is written");
        expect(one.step < model.steps && one.output < slots.size() && slots[one.output].kind == SlotKind::Output, "an evaluation");
        expect(outputs.insert(one.output).second, "two evaluations write one slot");
    }
    for (u32 output : outputs) written[output] = true;
}

void Program::check_combine(const Operation &operation, std::vector<bool> &written) const {
    const u32 *sources = &references[operation.first], *targets = sources + operation.size;
    for (u32 n = 0; n < operation.size; ++n) {
        expect(sources[n] < slots.size() && written[sources[n]], "a combination reads a slot before it is written");
    }
    expect(distinct(sources, operation.size) && distinct(targets, operation.targets_size), "a slot is there twice");
    for (u32 n = 0; n < operation.targets_size; ++n) {
        u32 target = targets[n];
        expect(target < slots.size() && (slots[target].kind == SlotKind::State || slots[target].kind == SlotKind::Latent), "a target");
        written[target] = true;
    }
}

}  // namespace driffusion
