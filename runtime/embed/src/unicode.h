// The little of Unicode that CLIP's tokenizer needs: classes, lower case, and normalization form C (UAX #15).
#pragma once
#include <string>
#include <string_view>

namespace driffusion {

std::u32string decoded(std::string_view utf8);  // of valid UTF-8
bool is_letter(char32_t code);
bool is_number(char32_t code);
bool is_space(char32_t code);
std::u32string composed(const std::u32string &text);
std::u32string lowered(const std::u32string &text);

}  // namespace driffusion
