#include "tokenizer.h"

#include <algorithm>

#include "error.h"
#include "json.h"
#include "unicode.h"

namespace driffusion {
namespace {

std::unique_ptr<TextModel> model_of(const Json &file) {
    const Json &type = file["model"]["type"];
    if (type.is("BPE")) return clip_model(file);
    if (type.is("Unigram")) return unigram_model(file);
    fail(DRIFFUSION_ERROR_UNSUPPORTED, "its model is " + type.text + ", neither CLIP's BPE nor T5's Unigram");
}

}  // namespace

void need_part(bool known, const std::string &part) {
    if (!known) fail(DRIFFUSION_ERROR_UNSUPPORTED, "its " + part + " is not that of CLIP or T5");
}

std::unique_ptr<Tokenizer> Tokenizer::load(std::string_view json) { return std::unique_ptr<Tokenizer>(new Tokenizer(Json::parse(json))); }

Tokenizer::Tokenizer(const Json &file) : model_(model_of(file)) {
    read_added(file["added_tokens"]);
    read_post_processor(file["post_processor"]);
}

void Tokenizer::read_added(const Json &json) {
    for (const Json &one : json.list) {
        const std::string &content = one["content"].text;
        bool known = one["special"].kind == Json::Kind::True && one["single_word"].no() && one["normalized"].no() && !content.empty();
        // spaces at an end of a token would belong to it and to what it strips
        known = known && !trimmed_before(content) && trimmed_behind(content) == content.size();
        need_part(known, "added token");
        added_.push_back({content, i64(one["id"].number), one["lstrip"].kind == Json::Kind::True, one["rstrip"].kind == Json::Kind::True});
    }
    for (const Added &one : added_) {  // of a textual inversion: diffusers writes all of its tokens for the first
        bool several = std::any_of(added_.begin(), added_.end(), [&](const Added &other) { return other.content == one.content + "_1"; });
        if (several) fail(DRIFFUSION_ERROR_UNSUPPORTED, "its added token " + one.content + " has several vectors");
    }
}

void Tokenizer::read_post_processor(const Json &json) {
    if (json["type"].is("RobertaProcessing")) {
        need_part(json["cls"].list.size() == 2 && json["sep"].list.size() == 2, "post_processor");
        before_ = {i64(json["cls"].list[1].number)}, behind_ = {i64(json["sep"].list[1].number)};
        return;
    }
    need_part(json["type"].is("TemplateProcessing"), "post_processor");
    bool text = false;
    for (const Json &one : json["single"].list) {
        if (one["Sequence"].kind == Json::Kind::Object) {
            need_part(!text, "post_processor");
            text = true;
            continue;
        }
        auto &ids = json["special_tokens"][one["SpecialToken"]["id"].text]["ids"].list;
        need_part(!ids.empty(), "post_processor");
        for (const Json &id : ids) (text ? behind_ : before_).push_back(i64(id.number));
    }
    need_part(text, "post_processor");
}

std::vector<i64> Tokenizer::encode(std::string_view text) const {
    std::vector<i64> ids = before_;
    std::size_t start = 0, at = 0;
    while (at < text.size()) {
        const Added *found = nullptr;  // the longest of those that begin here
        for (const Added &added : added_) {
            if (text.compare(at, added.content.size(), added.content) == 0 && (!found || added.content.size() > found->content.size())) found = &added;
        }
        if (!found) {
            ++at;
            continue;
        }
        std::string_view plain = text.substr(start, at - start);
        if (found->strips_before) plain = plain.substr(0, trimmed_behind(plain));
        if (!plain.empty()) model_->encode(plain, ids);
        ids.push_back(found->id);
        at += found->content.size();
        if (found->strips_behind) at += trimmed_before(text.substr(at));
        start = at;
    }
    if (start < text.size()) model_->encode(text.substr(start), ids);
    ids.insert(ids.end(), behind_.begin(), behind_.end());
    return ids;
}

}  // namespace driffusion
