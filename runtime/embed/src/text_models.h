// What a tokenizer makes of text between added tokens: CLIP's byte pairs, T5's pieces.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

namespace driffusion {

class Json;

class TextModel {
   public:
    virtual ~TextModel() = default;
    virtual void encode(std::string_view text, std::vector<i64> &ids) const = 0;
};

// Both throw UNSUPPORTED, by the part's name, for a file that asks for anything else than theirs do.
std::unique_ptr<TextModel> clip_model(const Json &file);
std::unique_ptr<TextModel> unigram_model(const Json &file);

// Throws UNSUPPORTED with the name of a part that is of another kind.
void need_part(bool known, const std::string &part);

}  // namespace driffusion
