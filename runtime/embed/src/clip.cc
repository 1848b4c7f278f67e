#include <algorithm>
#include <array>
#include <queue>
#include <string>
#include <unordered_map>

#include "json.h"
#include "text_models.h"
#include "unicode.h"

namespace driffusion {
namespace {

const std::string CLIP_WORDS = R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

// GPT-2's bytes as printable characters: what a byte-level vocabulary is written in.
std::array<std::string, 256> byte_characters() {
    std::array<std::string, 256> found;
    char32_t next = 256;
    for (u32 byte = 0; byte < 256; ++byte) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        append_utf8(found[byte], printable ? char32_t(byte) : next++);
    }
    return found;
}

class Clip : public TextModel {
   public:
    explicit Clip(const Json &file) : bytes_(byte_characters()) {
        read_normalizer(file["normalizer"]);
        read_pre_tokenizer(file["pre_tokenizer"]);
        read_model(file["model"]);
    }

    void encode(std::string_view text, std::vector<i64> &ids) const override {
        std::u32string clean = lowered(composed(decoded(text)));
        for (const std::u32string &word : words(clean, true)) {
            for (const std::u32string &part : words(word, false)) encode_word(part, ids);
        }
    }

   private:
    void read_normalizer(const Json &json) {
        auto &list = json["normalizers"].list;
        need_part(json["type"].is("Sequence") && list.size() == 3, "normalizer");
        need_part(list[0]["type"].is("NFC") && list[2]["type"].is("Lowercase"), "normalizer");
        need_part(list[1]["type"].is("Replace") && list[1]["pattern"]["Regex"].is("\\s+") && list[1]["content"].is(" "), "normalizer");
    }

    void read_pre_tokenizer(const Json &json) {
        auto &list = json["pretokenizers"].list;
        need_part(json["type"].is("Sequence") && list.size() == 2, "pre_tokenizer");
        need_part(list[0]["type"].is("Split") && list[0]["pattern"]["Regex"].is(CLIP_WORDS), "pre_tokenizer");
        need_part(list[0]["behavior"].is("Removed") && list[0]["invert"].kind == Json::Kind::True, "pre_tokenizer");
        need_part(list[1]["type"].is("ByteLevel") && list[1]["add_prefix_space"].no(), "pre_tokenizer");
    }

    void read_model(const Json &json) {
        need_part(json["type"].is("BPE") && json["dropout"].none() && json["end_of_word_suffix"].is("</w>"), "model");
        need_part(json["continuing_subword_prefix"].none() || json["continuing_subword_prefix"].is(""), "model");
        for (const char *flag : {"fuse_unk", "byte_fallback", "ignore_merges"}) need_part(json[flag].none() || json[flag].no(), "model");
        for (auto &[token, id] : json["vocab"].object) vocabulary_[token] = i64(id.number);
        unknown_ = json["unk_token"].none() ? -1 : known(json["unk_token"].text);
        u32 rank = 0;
        for (const Json &merge : json["merges"].list) {
            auto space = merge.text.find(' ');
            bool pair = merge.list.size() == 2;
            need_part(pair || (merge.kind == Json::Kind::Text && space != std::string::npos), "list of merges");
            std::string left = pair ? merge.list[0].text : merge.text.substr(0, space), right = pair ? merge.list[1].text : merge.text.substr(space + 1);
            merges_.emplace(key(known(left), known(right)), std::make_pair(rank++, known(left + right)));
        }
        for (u32 byte = 0; byte < 256; ++byte) {
            auto inner = vocabulary_.find(bytes_[byte]), last = vocabulary_.find(bytes_[byte] + "</w>");
            inner_[byte] = inner == vocabulary_.end() ? unknown_ : inner->second;
            last_[byte] = last == vocabulary_.end() ? unknown_ : last->second;
        }
    }

    i64 known(const std::string &token) const {
        auto found = vocabulary_.find(token);
        need_part(found != vocabulary_.end(), "vocabulary");
        return found->second;
    }

    static u64 key(i64 left, i64 right) { return u64(left) << 32 | u64(right); }

    // CLIP's regular expression, or then GPT-2's, which knows no names of tokens and takes numbers together.
    static std::vector<std::u32string> words(const std::u32string &text, bool clip) {
        static const std::vector<std::u32string> names = {U"<|startoftext|>", U"<|endoftext|>"}, endings = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};
        std::vector<std::u32string> found;
        for (std::size_t at = 0; at < text.size();) {
            std::size_t size = 0;
            auto literal = [&](const std::vector<std::u32string> &list) {
                for (const std::u32string &one : list) {
                    if (!size && text.compare(at, one.size(), one) == 0) size = one.size();
                }
            };
            auto run = [&](bool (*of)(char32_t)) {
                while (at + size < text.size() && of(text[at + size])) ++size;
            };
            if (clip) literal(names);
            if (!size) literal(endings);
            if (!size && is_letter(text[at])) run(is_letter);
            if (!size && is_number(text[at])) clip ? void(size = 1) : run(is_number);
            if (!size && !is_space(text[at])) run([](char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); });
            if (size) found.push_back(text.substr(at, size));
            at += std::max<std::size_t>(size, 1);
        }
        return found;
    }

    // Byte pair encoding: of all neighbours the pair of the lowest rank is merged, the first of equals, until none is left.
    void encode_word(const std::u32string &word, std::vector<i64> &ids) const {
        struct Symbol {
            i64 id;
            std::ptrdiff_t before, after;
            bool there;
        };
        struct Merge {
            u32 rank;
            std::ptrdiff_t at;
            i64 left, right, made;
            bool operator<(const Merge &other) const { return std::make_pair(rank, at) > std::make_pair(other.rank, other.at); }
        };
        std::string utf8;
        for (char32_t code : word) append_utf8(utf8, code);
        std::vector<Symbol> symbols;
        const auto size = std::ptrdiff_t(utf8.size());
        for (std::ptrdiff_t n = 0; n < size; ++n) {
            auto byte = static_cast<unsigned char>(utf8[std::size_t(n)]);
            symbols.push_back({n + 1 < size ? inner_[byte] : last_[byte], n - 1, n + 1 < size ? n + 1 : -1, true});
        }
        std::priority_queue<Merge> queue;
        auto offer = [&](std::ptrdiff_t at) {
            if (at < 0 || symbols[std::size_t(at)].after < 0) return;
            const Symbol &left = symbols[std::size_t(at)], &right = symbols[std::size_t(left.after)];
            auto found = merges_.find(key(left.id, right.id));
            if (found != merges_.end()) queue.push({found->second.first, at, left.id, right.id, found->second.second});
        };
        for (std::ptrdiff_t n = 0; n < size; ++n) offer(n);
        while (!queue.empty()) {
            Merge merge = queue.top();
            queue.pop();
            Symbol &left = symbols[std::size_t(merge.at)];
            if (!left.there || left.id != merge.left || left.after < 0 || symbols[std::size_t(left.after)].id != merge.right) continue;
            Symbol &right = symbols[std::size_t(left.after)];
            right.there = false;
            left.id = merge.made, left.after = right.after;
            if (left.after >= 0) symbols[std::size_t(left.after)].before = merge.at;
            offer(left.before);
            offer(merge.at);
        }
        for (const Symbol &one : symbols) {
            if (one.there && one.id >= 0) ids.push_back(one.id);
        }
    }

    std::array<std::string, 256> bytes_;
    std::unordered_map<std::string, i64> vocabulary_;
    std::unordered_map<u64, std::pair<u32, i64>> merges_;
    std::array<i64, 256> inner_{}, last_{};
    i64 unknown_ = -1;
};

}  // namespace

std::unique_ptr<TextModel> clip_model(const Json &file) { return std::make_unique<Clip>(file); }

}  // namespace driffusion
