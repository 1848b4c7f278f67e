#include "unicode.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace driffusion {
namespace {

struct Range {
    char32_t first, last;
};
struct Lower {
    char32_t code, first, second;
};
struct Parts {
    char32_t code, parts[4];
};
struct Pair {
    char32_t first, second, composed;
};
struct Class {
    char32_t code;
    std::uint8_t value;
};

// missing braces around `parts` are those of a flat table
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"
#include "unicode_tables.inc"
#pragma GCC diagnostic pop

constexpr char32_t HANGUL = 0xac00, LEAD = 0x1100, VOWEL = 0x1161, TAIL = 0x11a7;
constexpr char32_t LEADS = 19, VOWELS = 21, TAILS = 28, SYLLABLES = LEADS * VOWELS * TAILS;

template <std::size_t N>
bool within(const Range (&ranges)[N], char32_t code) {
    auto after = std::upper_bound(std::begin(ranges), std::end(ranges), code, [](char32_t c, const Range &range) { return c < range.first; });
    return after != std::begin(ranges) && code <= std::prev(after)->last;
}

template <typename Row, std::size_t N>
const Row *find(const Row (&rows)[N], char32_t code) {
    auto found = std::lower_bound(std::begin(rows), std::end(rows), code, [](const Row &row, char32_t c) { return row.code < c; });
    return found != std::end(rows) && found->code == code ? found : nullptr;
}

std::uint8_t combining_class(char32_t code) {
    const Class *found = find(CLASSES, code);
    return found ? found->value : 0;
}

void decompose(char32_t code, std::u32string &into) {
    if (code - HANGUL < SYLLABLES) {
        char32_t index = code - HANGUL;
        into += LEAD + index / (VOWELS * TAILS);
        into += VOWEL + index % (VOWELS * TAILS) / TAILS;
        if (index % TAILS) into += TAIL + index % TAILS;
        return;
    }
    const Parts *found = find(PARTS, code);
    if (!found) {
        into += code;
        return;
    }
    for (char32_t part : found->parts) {
        if (part) into += part;
    }
}

// The composition of two code points, or 0.
char32_t compose(char32_t a, char32_t b) {
    if (a - LEAD < LEADS && b - VOWEL < VOWELS) return HANGUL + ((a - LEAD) * VOWELS + (b - VOWEL)) * TAILS;
    if (a - HANGUL < SYLLABLES && (a - HANGUL) % TAILS == 0 && b > TAIL && b - TAIL < TAILS) return a + (b - TAIL);
    auto key = [](const Pair &pair) { return std::make_pair(pair.first, pair.second); };
    auto wanted = std::make_pair(a, b);
    auto found = std::lower_bound(std::begin(PAIRS), std::end(PAIRS), wanted, [&](const Pair &pair, const auto &w) { return key(pair) < w; });
    return found != std::end(PAIRS) && key(*found) == wanted ? found->composed : 0;
}

}  // namespace

std::u32string decoded(std::string_view utf8) {
    std::u32string text;
    for (std::size_t i = 0; i < utf8.size();) {
        auto first = static_cast<unsigned char>(utf8[i++]);
        int more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        char32_t code = more ? first & (0x3fu >> more) : first;
        for (; more; --more) code = code << 6 | (static_cast<unsigned char>(utf8[i++]) & 0x3f);
        text += code;
    }
    return text;
}

bool is_letter(char32_t code) { return within(LETTERS, code); }
bool is_number(char32_t code) { return within(NUMBERS, code); }
bool is_space(char32_t code) { return within(SPACES, code); }

std::u32string composed(const std::u32string &text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x300; })) return text;
    std::u32string apart;
    for (char32_t code : text) decompose(code, apart);
    // marks in the order of their classes, between two code points without one
    for (std::size_t start = 0; start < apart.size();) {
        if (!combining_class(apart[start])) {
            ++start;
            continue;
        }
        std::size_t end = start;
        while (end < apart.size() && combining_class(apart[end])) ++end;
        std::stable_sort(apart.begin() + std::ptrdiff_t(start), apart.begin() + std::ptrdiff_t(end), [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
        start = end;
    }
    std::u32string made;
    std::size_t starter = std::u32string::npos;
    int last = -1;  // class of the code point before, -1 right after the starter
    for (char32_t code : apart) {
        int own = combining_class(code);
        char32_t both = starter != std::u32string::npos && last < own ? compose(made[starter], code) : 0;
        if (!both && starter != std::u32string::npos && last == -1) both = compose(made[starter], code);
        if (both) {
            made[starter] = both;
            continue;
        }
        made += code;
        if (own) {
            last = own;
        } else {
            starter = made.size() - 1;
            last = -1;
        }
    }
    return made;
}

std::u32string lowered(const std::u32string &text) {
    std::u32string made;
    for (char32_t code : text) {
        const Lower *found = find(LOWER, code);
        made += found ? found->first : code;
        if (found && found->second) made += found->second;
    }
    return made;
}

}  // namespace driffusion
