//! Saving and describing: what is written, and what it means.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};

use crate::attributes::Description;
use crate::field::{Counts, Field, Kind, Length, Which};

impl Description {
    pub fn save(&self) -> TokenStream {
        let (plain, parts) = self.parts();
        let present: Vec<_> = plain.into_iter().filter(|field| field.until.is_none()).collect();
        let save = present.iter().map(|field| field.save());
        let save_parts = parts.iter().map(|field| field.on_part("save", quote!(out)));
        let describe = present.iter().map(|field| field.describe());
        let describe_parts = parts.iter().map(|field| field.on_part("describe", quote!(description)));
        quote! {
            fn save_fields(&self, out: &mut ::std::vec::Vec<u8>) {
                #(#save)*
                #(#save_parts)*
            }

            fn describe_fields(&self, description: &mut ::vmstate::Description) {
                #(#describe)*
                #(#describe_parts)*
            }
        }
    }
}

impl Field {
    fn save(&self) -> TokenStream {
        let (ident, ty, layout) = (&self.ident, &self.ty, self.layout());
        match &self.kind {
            Kind::Plain { .. } => quote!(#layout::save(&self.#ident, out);),
            Kind::Count { of, .. } => {
                let counts = of.iter().map(Counts::real);
                quote! {
                    let count = ::vmstate::derived::shared_count(self.#ident as usize, &[#(#counts),*]);
                    #layout::save(&(count as #ty), out);
                }
            }
            Kind::Counted { length } => {
                let keeps = length.kept_by(quote!(#layout::count(&self.#ident)));
                quote!(#keeps #layout::save(&self.#ident, out);)
            }
            Kind::Rows { row, length, each } => {
                let keeps = length.kept_by(quote!(::std::option::Option::Some(self.#ident.len())));
                let each_keeps =
                    each.kept_by(quote!(::vmstate::derived::rows::each_count::<#row>(&self.#ident)));
                quote!(#keeps #each_keeps ::vmstate::derived::rows::save::<#row>(&self.#ident, out);)
            }
            Kind::List { item, .. } => quote!(::vmstate::derived::list::save::<#item>(&self.#ident, out);),
            Kind::Subsection { .. } => TokenStream::new(),
        }
    }

    fn on_part(&self, function: &str, target: TokenStream) -> TokenStream {
        let (ident, part, function) = (&self.ident, self.part(), format_ident!("{function}"));
        let needed = match &self.kind {
            Kind::Subsection { needed: Some(needed), .. } => quote!(#needed(self)),
            _ => quote!(true),
        };
        quote!(::vmstate::derived::subsection::#function::<#part>(self.#ident.as_ref(), #needed, #target);)
    }

    fn describe(&self) -> TokenStream {
        let (ident, name) = (&self.ident, self.name());
        match &self.kind {
            Kind::List { item, .. } => {
                quote!(::vmstate::derived::list::describe::<#item>(&self.#ident, #name, description);)
            }
            Kind::Rows { row, .. } => {
                quote!(::vmstate::derived::rows::describe::<#row>(&self.#ident, #name, description);)
            }
            _ => {
                let layout = self.layout();
                quote!(#layout::describe(&self.#ident, #name, description);)
            }
        }
    }
}

impl Counts {
    /// The length that the later field has.
    fn real(&self) -> TokenStream {
        let field = &self.field;
        match self.which {
            Which::Only => quote_spanned!(field.span()=> ::vmstate::Counted::count(&self.#field)),
            Which::Rows => quote_spanned!(field.span()=> ::std::option::Option::Some(self.#field.len())),
            Which::Each => quote_spanned!(field.span()=> ::vmstate::derived::rows::each_count(&self.#field)),
        }
    }
}

impl Length {
    /// Saving cannot fail, so a state that breaks its own description is a mistake of the program.
    fn kept_by(&self, count: TokenStream) -> TokenStream {
        match self {
            Length::Field { max, .. } | Length::Context { max, .. } => quote! {
                ::std::debug_assert!(#count.is_none_or(|count| count <= (#max) as usize), "more elements than `max`");
            },
            Length::Constant(constant) => quote! {
                ::std::debug_assert!(#count.is_none_or(|count| count == #constant), "another length than the description's");
            },
        }
    }
}
