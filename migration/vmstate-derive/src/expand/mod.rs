//! Writes the implementation from the checked attributes.

use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::Ident;
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use crate::attributes::{Description, Header};
use crate::field::{Field, Kind, Length};

mod load;
mod save;
mod schema;

pub fn expand(description: &Description) -> TokenStream {
    let Description { ident, header: Header { name, version, oldest, .. }, .. } = description;
    let asserts = description.asserts();
    let constants = description.constants();
    let save = description.save();
    let load = description.load();
    let schema = description.schema();

    quote! {
        const _: () = {
            #[allow(dead_code)]
            const PARENT: &str = #name;
            #asserts
        };

        #[automatically_derived]
        impl ::vmstate::VmState for #ident {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const OLDEST: u32 = #oldest;
            #constants
            #save
            #load
            #schema
        }
    }
}

impl Description {
    /// The fields, and the subsections that follow them.
    fn parts(&self) -> (Vec<&Field>, Vec<&Field>) {
        self.fields.iter().partition(|field| !matches!(field.kind, Kind::Subsection { .. }))
    }

    /// What is known of the bytes and the stack before anything is loaded.
    fn constants(&self) -> TokenStream {
        // The way back from a recursive struct to itself would have no end here.
        let stack =
            self.fields.iter().filter(|field| !field.recursive).map(|field| field.constant("STACK_BYTES"));
        let least = self.fields.iter().map(Field::least_bytes);
        quote! {
            const STACK_BYTES: usize = ::vmstate::derived::stack_bytes(::std::mem::size_of::<Self>(), &[#(#stack),*]);
            const LEAST_BYTES: usize = ::vmstate::derived::least_bytes(&[#(#least),*]);
        }
    }

    /// What only the types of the fields can tell.
    fn asserts(&self) -> TokenStream {
        let Description { ident, header: Header { oldest, version, depth, .. }, fields } = self;
        let versions = fields.iter().map(|field| field.versions_fit(*oldest, *version));
        let maxima =
            fields.iter().flat_map(|field| field.lengths()).map(|length| self.count_can_hold(length));
        let bounds = fields.iter().map(Field::bounds_agree);
        let names = self.parts_differ();
        let recursion = depth.map(|(depth, span)| {
            let levels =
                fields.iter().filter(|field| field.recursive).map(|field| field.constant("STACK_BYTES"));
            quote_spanned! {span=>
                ::std::assert!(
                    ::vmstate::derived::stack_suffices(::vmstate::derived::largest(&[#(#levels),*]), #depth),
                    "`depth` is more than a thread's stack has room for"
                );
            }
        });
        quote_spanned! {ident.span()=>
            #(#versions)*
            #(#names)*
            #(#bounds)*
            #(#maxima)*
            ::std::assert!(
                ::vmstate::derived::stack_suffices(<#ident as ::vmstate::VmState>::STACK_BYTES, 1),
                "the structs inside are too large or nested too deeply for a thread's stack"
            );
            #recursion
        }
    }

    /// A maximum that the count cannot reach is a mistake: saving would cut the length, or write what is refused on load.
    fn count_can_hold(&self, length: &Length) -> Option<TokenStream> {
        let Length::Field { count, max } = length else { return None };
        let field = self.fields.iter().find(|field| field.ident == *count)?;
        let ty = &field.ty;
        let largest = quote!((#max) as usize as u128);
        let must = |holds: TokenStream, otherwise: &str| {
            let message = format!("`{count}` {otherwise}");
            quote_spanned!(max.span()=> ::std::assert!(#holds, #message);)
        };
        let type_holds = must(quote!(#largest <= #ty::MAX as u128), "cannot hold so large a length");
        let max_allows = field.max().map(|own| {
            must(quote!(#largest <= { const MAX: #ty = #own; MAX as u128 }), "has a smaller `max` of its own")
        });
        let min_allows = field.min.as_ref().map(|own| {
            must(quote!(#largest >= { const MIN: #ty = #own; MIN as u128 }), "has a `min` above this")
        });
        Some(quote!(#type_holds #max_allows #min_allows))
    }

    /// The loader knows a subsection by its name alone: of two with one name it would fill the first twice.
    fn parts_differ(&self) -> Vec<TokenStream> {
        let (_, parts) = self.parts();
        let pairs =
            parts.iter().enumerate().flat_map(|(at, later)| parts[..at].iter().map(move |one| (one, later)));
        let differ = pairs.map(|(earlier, later)| {
            let message = format!(
                "`{}` has the name of `{}`: a stream cannot tell them apart",
                later.name(),
                earlier.name()
            );
            let (earlier, later) = (earlier.part(), later.part());
            quote_spanned! {later.span()=>
                ::std::assert!(
                    !::vmstate::derived::subsection::is_same(
                        <#later as ::vmstate::VmState>::NAME,
                        <#earlier as ::vmstate::VmState>::NAME,
                    ),
                    #message
                );
            }
        });
        differ.collect()
    }
}

impl Field {
    /// The variable that holds the field while a struct is loaded.
    fn local(&self) -> Ident {
        local(&self.ident)
    }

    /// Its name in descriptions and errors. `r#type` is there for the compiler alone.
    fn name(&self) -> String {
        self.ident.unraw().to_string()
    }

    /// The type of a subsection.
    fn part(&self) -> &syn::Type {
        match &self.kind {
            Kind::Subsection { part, .. } => part,
            _ => &self.ty,
        }
    }

    /// The type and the trait that lay the field out, as `<T as Trait>`.
    fn layout(&self) -> TokenStream {
        let ty = &self.ty;
        match &self.kind {
            Kind::Plain { .. } | Kind::Count { .. } => quote_spanned!(ty.span()=> <#ty as ::vmstate::Value>),
            Kind::Counted { .. } => quote_spanned!(ty.span()=> <#ty as ::vmstate::Counted>),
            Kind::Rows { row, .. } => quote_spanned!(row.span()=> <#row as ::vmstate::Counted>),
            Kind::List { item, .. } => quote_spanned!(item.span()=> <#item as ::vmstate::Value>),
            Kind::Subsection { part, .. } => quote_spanned!(part.span()=> <#part as ::vmstate::VmState>),
        }
    }

    fn constant(&self, name: &str) -> TokenStream {
        let (layout, name) = (self.layout(), format_ident!("{name}"));
        quote!(#layout::#name)
    }

    /// The fewest bytes of the field in any version. What has a length may have none.
    fn least_bytes(&self) -> TokenStream {
        match &self.kind {
            _ if self.since.is_some() || self.until.is_some() => quote!(0),
            Kind::Plain { .. } | Kind::Count { .. } => self.constant("LEAST_BYTES"),
            Kind::List { .. } => quote!(1),
            Kind::Counted { .. } | Kind::Rows { .. } | Kind::Subsection { .. } => quote!(0),
        }
    }

    /// No value is above the one and below the other.
    fn bounds_agree(&self) -> Option<TokenStream> {
        let (ty, min, max) = (&self.ty, self.min.as_ref()?, self.max()?);
        Some(quote_spanned! {min.span()=> {
            const MIN: #ty = #min;
            const MAX: #ty = #max;
            ::std::assert!(MIN <= MAX, "`min` is above `max`");
        }})
    }

    /// The version of the struct inside must be clear in every version of ours.
    fn versions_fit(&self, oldest: u32, version: u32) -> TokenStream {
        let ty = &self.ty;
        if let Kind::Subsection { part, .. } = &self.kind {
            return quote_spanned! {part.span()=>
                ::std::assert!(
                    ::vmstate::derived::subsection::is_part_of(<#part as ::vmstate::VmState>::NAME, PARENT),
                    "a subsection's name is the name of its parent, a slash, and its own"
                );
            };
        }
        let (first, last) = self.span_of_versions(oldest, version);
        let (struct_oldest, struct_version) =
            (self.constant("STRUCT_OLDEST"), self.constant("STRUCT_VERSION"));
        let versions = &self.versions;
        if !versions.is_empty() {
            quote_spanned! {ty.span()=>
                ::std::assert!(
                    ::vmstate::derived::versions_fit(&[#(#versions),*], #struct_oldest, #struct_version),
                    "`versions` must be versions that the struct inside reads, and end with its newest"
                );
            }
        } else if first != last {
            quote_spanned! {ty.span()=>
                ::std::assert!(
                    #struct_oldest == #struct_version,
                    "the struct inside has several versions: say with `versions` which of them each version of this one holds"
                );
            }
        } else {
            TokenStream::new()
        }
    }
}

/// The variable that holds the field `name` while a struct is loaded.
fn local(name: &Ident) -> Ident {
    format_ident!("field_{}", name.unraw())
}

fn option(value: Option<impl ToTokens>) -> TokenStream {
    match value {
        Some(value) => quote!(::std::option::Option::Some(#value)),
        None => quote!(::std::option::Option::None),
    }
}
