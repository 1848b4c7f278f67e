// The little of Unicode that CLIP's and T5's tokenizers need: classes, lower case, normalization form C (UAX #15), and
// grapheme clusters (UAX #29).
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace driffusion {

std::u32string decoded(std::string_view utf8);  // of valid UTF-8
bool is_letter(char32_t code);
bool is_number(char32_t code);
bool is_space(char32_t code);
std::u32string composed(const std::u32string &text);
std::u32string lowered(const std::u32string &text);
// Parts of a UTF-8 text: its extended grapheme clusters, and the code points of one.
std::vector<std::string_view> clusters(std::string_view utf8);
std::vector<std::string_view> characters(std::string_view utf8);
// Bytes of white space at the beginning of a UTF-8 text, and bytes of the text before that at its end.
std::size_t trimmed_before(std::string_view utf8);
std::size_t trimmed_behind(std::string_view utf8);

}  // namespace driffusion
