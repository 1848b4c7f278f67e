// Extended grapheme clusters, by the rules GB3 to GB11 of UAX #29; those for flags (GB12, GB13) change nothing that a
// normalizer of tokenizers can see, which takes clusters of at most five bytes as one, and are left out.
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "unicode.h"

namespace driffusion {
namespace {

enum class Kind : std::uint8_t { Other, Control, Extend, Linker, Spacing, Prepend, L, V, T, Pictograph, Consonant, Syllable, SyllableWithTail };

struct Break {
    char32_t first, last;
    Kind kind;
};
#include "cluster_tables.inc"

constexpr char32_t JOINER = 0x200d, NON_JOINER = 0x200c, HANGUL = 0xac00, SYLLABLES = 11172, TAILS = 28;

Kind kind_of(char32_t code) {
    if (code - HANGUL < SYLLABLES) return (code - HANGUL) % TAILS ? Kind::SyllableWithTail : Kind::Syllable;
    auto after = std::upper_bound(std::begin(BREAKS), std::end(BREAKS), code, [](char32_t c, const Break &row) { return c < row.first; });
    if (after == std::begin(BREAKS) || code > std::prev(after)->last) return Kind::Other;
    return std::prev(after)->kind;
}

// Whether code points belong together, asked for one after the other.
class Joining {
   public:
    bool operator()(char32_t code) {
        const Kind kind = kind_of(code);
        const bool joins = known_ && together(code, kind);
        remember(code, kind);
        return joins;
    }

   private:
    bool together(char32_t code, Kind kind) const {
        if (last_ == U'\r' && code == U'\n') return true;
        if (before_ == Kind::Control || kind == Kind::Control) return false;
        if (kind == Kind::Extend || kind == Kind::Linker || kind == Kind::Spacing || before_ == Kind::Prepend) return true;
        const bool lead = before_ == Kind::L, vowel = before_ == Kind::V || before_ == Kind::Syllable, tail = before_ == Kind::T || before_ == Kind::SyllableWithTail;
        if (lead && (kind == Kind::L || kind == Kind::V || kind == Kind::Syllable || kind == Kind::SyllableWithTail)) return true;
        if (vowel && (kind == Kind::V || kind == Kind::T)) return true;
        if (tail && kind == Kind::T) return true;
        if (pictograph_ && last_ == JOINER && kind == Kind::Pictograph) return true;
        return consonant_ && linked_ && kind == Kind::Consonant;
    }

    void remember(char32_t code, Kind kind) {
        const bool extends = kind == Kind::Extend || kind == Kind::Linker || code == JOINER;
        pictograph_ = kind == Kind::Pictograph || (pictograph_ && extends && last_ != JOINER);
        if (kind == Kind::Consonant) {
            consonant_ = true, linked_ = false;
        } else {
            consonant_ = consonant_ && extends && code != NON_JOINER;
            linked_ = linked_ || kind == Kind::Linker;
        }
        known_ = true, last_ = code, before_ = kind;
    }

    bool known_ = false, pictograph_ = false, consonant_ = false, linked_ = false;
    char32_t last_ = 0;
    Kind before_ = Kind::Other;
};

}  // namespace

std::vector<std::string_view> characters(std::string_view utf8) {
    std::vector<std::string_view> found;
    for (std::size_t start = 0; start < utf8.size();) {
        std::size_t end = start + 1;
        while (end < utf8.size() && (static_cast<unsigned char>(utf8[end]) & 0xc0) == 0x80) ++end;
        found.push_back(utf8.substr(start, end - start));
        start = end;
    }
    return found;
}

std::vector<std::string_view> clusters(std::string_view utf8) {
    std::vector<std::string_view> found;
    Joining joining;
    for (std::string_view character : characters(utf8)) {
        if (joining(decoded(character)[0])) {
            found.back() = {found.back().data(), found.back().size() + character.size()};
        } else {
            found.push_back(character);
        }
    }
    return found;
}

std::size_t trimmed_before(std::string_view utf8) {
    std::size_t size = 0;
    for (std::string_view character : characters(utf8)) {
        if (!is_space(decoded(character)[0])) break;
        size += character.size();
    }
    return size;
}

std::size_t trimmed_behind(std::string_view utf8) {
    std::size_t size = 0, at = 0;
    for (std::string_view character : characters(utf8)) {
        at += character.size();
        if (!is_space(decoded(character)[0])) size = at;
    }
    return size;
}

}  // namespace driffusion
