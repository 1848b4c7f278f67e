// T5's tokenizer: SentencePiece's Unigram model as `tokenizers` has it, with its table of characters to replace.
#include <algorithm>
#include <functional>
#include <string>
#include <unordered_map>

#include "error.h"
#include "json.h"
#include "text_models.h"
#include "unicode.h"

namespace driffusion {
namespace {

constexpr double UNKNOWN_PENALTY = 10.0;
constexpr std::size_t SHORT_CLUSTER = 6;  // bytes from which a cluster is looked up character by character

[[noreturn]] void damaged() { fail(DRIFFUSION_ERROR_BUNDLE, "the tokenizer's precompiled_charsmap is damaged"); }

std::string base64(const std::string &text) {
    std::string made;
    u32 bits = 0;
    int count = 0;
    std::size_t end = text.find_last_not_of('=') + 1;
    if (text.size() % 4 || text.size() - end > 2) damaged();
    static const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (std::size_t at = 0; at < end; ++at) {
        const std::size_t digit = digits.find(text[at]);
        if (digit == digits.npos) damaged();
        bits = bits << 6 | u32(digit);
        count += 6;
        if (count >= 8) count -= 8, made += char(bits >> count & 0xff);
    }
    return made;
}

// What SentencePiece compiles normalization rules into: a double-array trie of UTF-8 (Yata et al., as darts-clone has it)
// whose values are offsets of texts that end with 0.
class CharacterMap {
   public:
    explicit CharacterMap(const std::string &content) {
        auto word = [&](std::size_t at) {
            u32 value = 0;
            for (std::size_t n = 0; n < 4; ++n) value |= u32(static_cast<unsigned char>(content[at + n])) << (8 * n);
            return value;
        };
        const std::size_t size = content.size() < 4 ? 0 : word(0);
        if (!size || size % 4 || content.size() - 4 < size) damaged();
        for (std::size_t at = 4; at < 4 + size; at += 4) units_.push_back(word(at));
        texts_ = content.substr(4 + size);
        if (!valid_utf8(texts_)) damaged();
    }

    std::string normalized(std::string_view text) const {
        std::string made;
        std::string_view replacement;
        for (std::string_view cluster : clusters(text)) {
            if (cluster.size() < SHORT_CLUSTER && find(cluster, replacement)) {
                made += replacement;
                continue;
            }
            for (std::string_view character : characters(cluster)) made += find(character, replacement) ? replacement : character;
        }
        return made;
    }

   private:
    // What the shortest beginning of a text that has an entry is replaced by.
    bool find(std::string_view text, std::string_view &replacement) const {
        auto offset = [](u32 unit) { return unit >> 10 << ((unit & 1u << 9) >> 6); };
        u32 at = offset(unit(0));
        for (char c : text) {
            const u32 byte = static_cast<unsigned char>(c);
            at ^= byte;
            const u32 found = unit(at);
            if ((found & (1u << 31 | 0xffu)) != byte) return false;
            at ^= offset(found);
            if (!(found & 1u << 8)) continue;
            const std::size_t start = unit(at) & ~(1u << 31);
            if (start > texts_.size()) damaged();
            replacement = std::string_view(texts_).substr(start, texts_.find('\0', start) - start);
            if (!valid_utf8(replacement)) damaged();  // an offset into a character
            return true;
        }
        return false;
    }
    u32 unit(u32 at) const {
        if (at >= units_.size()) damaged();
        return units_[at];
    }

    std::vector<u32> units_;
    std::string texts_;
};

// A run of at least two spaces becomes one text: the only replacement that conversions of T5 have.
std::string without_runs(const std::string &text, const std::string &content) {
    std::string made;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = std::min(text.find_first_not_of(' ', at), text.size());
        if (end - at >= 2) {
            made += content;
            at = end;
        } else {
            made += text[at++];
        }
    }
    return made;
}

class Unigram : public TextModel {
   public:
    explicit Unigram(const Json &file) {
        read_normalizer(file["normalizer"]);
        read_pre_tokenizer(file["pre_tokenizer"]);
        read_model(file["model"]);
    }

    void encode(std::string_view text, std::vector<i64> &ids) const override {
        std::string clean(text);
        for (const auto &step : normalizer_) clean = step(clean);
        if (!by_spaces_) return encode_word(clean, ids);
        std::string word;
        for (std::string_view character : characters(clean)) {
            if (!is_space(decoded(character)[0])) {
                word += character;
                continue;
            }
            encode_word(word, ids);
            word.clear();
        }
        encode_word(word, ids);
    }

   private:
    void read_normalizer(const Json &json) {
        if (json.none()) return;
        const Json &type = json["type"];
        if (type.is("Sequence")) {
            for (const Json &one : json["normalizers"].list) read_normalizer(one);
        } else if (type.is("Precompiled")) {
            normalizer_.emplace_back([map = CharacterMap(base64(json["precompiled_charsmap"].text))](const std::string &text) { return map.normalized(text); });
        } else if (type.is("Strip")) {
            const bool before = json["strip_left"].kind == Json::Kind::True, behind = json["strip_right"].kind == Json::Kind::True;
            normalizer_.emplace_back([before, behind](const std::string &text) {
                const std::string kept = behind ? text.substr(0, trimmed_behind(text)) : text;
                return before ? kept.substr(trimmed_before(kept)) : kept;
            });
        } else {
            need_part(type.is("Replace") && json["pattern"]["Regex"].is(" {2,}") && json["content"].kind == Json::Kind::Text, "normalizer");
            normalizer_.emplace_back([content = json["content"].text](const std::string &text) { return without_runs(text, content); });
        }
    }

    void read_pre_tokenizer(const Json &json) {
        const Json *marks = &json;
        if (json["type"].is("Sequence")) {
            auto &list = json["pretokenizers"].list;
            need_part(list.size() == 2 && list[0]["type"].is("WhitespaceSplit"), "pre_tokenizer");
            by_spaces_ = true;
            marks = &list[1];
        }
        const Json &scheme = (*marks)["prepend_scheme"];
        need_part((*marks)["type"].is("Metaspace") && (scheme.is("always") || (scheme.none() && !(*marks)["add_prefix_space"].no())), "pre_tokenizer");
        mark_ = (*marks)["replacement"].text;
        splits_ = !(*marks)["split"].no();
        need_part(characters(mark_).size() == 1, "pre_tokenizer");
    }

    void read_model(const Json &json) {
        need_part(json["byte_fallback"].none() || json["byte_fallback"].no(), "model");
        auto &list = json["vocab"].list;
        need_part(json["unk_id"].kind == Json::Kind::Number && json["unk_id"].number >= 0 && json["unk_id"].number < double(list.size()), "model");
        unknown_ = i64(json["unk_id"].number);
        std::unordered_map<std::string, i64> last;  // of a piece that is there twice the second counts
        i64 next = 0;
        for (const Json &piece : list) {
            need_part(piece.list.size() == 2 && piece.list[1].kind == Json::Kind::Number, "model");
            lowest_ = next == 0 ? piece.list[1].number : std::min(lowest_, piece.list[1].number);
            last[piece.list[0].text] = next++;
        }
        for (auto &[text, id] : last) {
            if (!text.empty()) pieces_.push_back({text, id, list[std::size_t(id)].list[1].number});
        }
        std::sort(pieces_.begin(), pieces_.end(), [](const Piece &a, const Piece &b) { return a.text < b.text; });
    }

    struct Piece {
        std::string text;
        i64 id;
        double score;
    };
    struct Best {  // way to a place in a text
        double score = 0;
        std::size_t start = std::string::npos;
        const Piece *piece = nullptr;  // null: an unknown character
    };

    // Metaspace, and then each part that begins with its mark.
    void encode_word(const std::string &word, std::vector<i64> &ids) const {
        if (word.empty()) return;
        std::string marked;
        for (char c : word) c == ' ' ? marked += mark_ : marked += c;
        if (marked.compare(0, mark_.size(), mark_) != 0) marked = mark_ + marked;
        for (std::size_t start = 0; start < marked.size();) {
            const std::size_t end = splits_ ? std::min(marked.find(mark_, start + mark_.size()), marked.size()) : marked.size();
            encode_part(std::string_view(marked).substr(start, end - start), ids);
            start = end;
        }
    }

    // The pieces with the highest sum of scores, by Viterbi; of equal sums the one with the earliest starts.
    void encode_part(std::string_view text, std::vector<i64> &ids) const {
        std::vector<Best> best(text.size() + 1);
        auto offer = [&](std::size_t start, std::size_t end, double score, const Piece *piece) {
            score += best[start].score;
            if (best[end].start == std::string::npos || score > best[end].score) best[end] = {score, start, piece};
        };
        for (std::size_t start = 0; start < text.size();) {
            const std::size_t one = characters(text.substr(start, 4))[0].size();
            bool single = false;
            each_prefix(text.substr(start), [&](const Piece &piece) {
                offer(start, start + piece.text.size(), piece.score, &piece);
                single = single || piece.text.size() == one;
            });
            if (!single) offer(start, start + one, lowest_ - UNKNOWN_PENALTY, nullptr);
            start += one;
        }
        const std::size_t before = ids.size();
        for (std::size_t end = text.size(); end > 0;) {
            const Best &last = best[end];
            if (is_known(last)) {
                ids.push_back(last.piece->id);
                end = last.start;
                continue;
            }
            std::size_t start = end;  // neighbours that are unknown are one token
            while (start > 0 && !is_known(best[start])) start = best[start].start;
            const Piece *whole = piece_of(text.substr(start, end - start));
            ids.push_back(whole ? whole->id : unknown_);
            end = start;
        }
        std::reverse(ids.begin() + std::ptrdiff_t(before), ids.end());
    }

    bool is_known(const Best &best) const { return best.piece && best.piece->id != unknown_; }

    const Piece *piece_of(std::string_view text) const {
        auto found = std::lower_bound(pieces_.begin(), pieces_.end(), text, [](const Piece &piece, std::string_view wanted) { return piece.text < wanted; });
        return found != pieces_.end() && found->text == text ? &*found : nullptr;
    }

    // Each piece that a text begins with, short ones first: the range of pieces with the same beginning, byte by byte.
    template <typename Use>
    void each_prefix(std::string_view text, Use use) const {
        auto first = pieces_.begin(), last = pieces_.end();
        for (std::size_t size = 0; size < text.size() && first != last; ++size) {
            const auto byte = static_cast<unsigned char>(text[size]);
            auto at = [size](const Piece &piece) { return piece.text.size() > size ? int(static_cast<unsigned char>(piece.text[size])) : -1; };
            first = std::lower_bound(first, last, int(byte), [&](const Piece &piece, int wanted) { return at(piece) < wanted; });
            last = std::upper_bound(first, last, int(byte), [&](int wanted, const Piece &piece) { return wanted < at(piece); });
            if (first != last && first->text.size() == size + 1) use(*first);
        }
    }

    std::vector<std::function<std::string(const std::string &)>> normalizer_;
    bool by_spaces_ = false, splits_ = true;
    std::string mark_;
    std::vector<Piece> pieces_;  // by their texts
    i64 unknown_ = 0;
    double lowest_ = 0;
};

}  // namespace

std::unique_ptr<TextModel> unigram_model(const Json &file) { return std::make_unique<Unigram>(file); }

}  // namespace driffusion
