// A `tokenizers` JSON file of CLIP's or T5's kind: what of the library is needed to make a prompt's ids, and no more.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text_models.h"

namespace driffusion {

class Tokenizer {
   public:
    // Error with UNSUPPORTED, by the part's name, for a file that asks for anything else than CLIP's or T5's does.
    static std::unique_ptr<Tokenizer> load(std::string_view json);

    // All ids of a text, with those at its beginning and end, uncut.
    std::vector<i64> encode(std::string_view text) const;

   private:
    struct Added {
        std::string content;
        i64 id;
        bool strips_before, strips_behind;
    };
    explicit Tokenizer(const Json &file);
    void read_added(const Json &json);
    void read_post_processor(const Json &json);

    std::unique_ptr<TextModel> model_;
    std::vector<Added> added_;
    std::vector<i64> before_, behind_;  // what stands around the ids of a text
};

}  // namespace driffusion
