//! The schema: what a description says of every value.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::Expr;
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use super::option;
use crate::attributes::{Description, Header};
use crate::field::{Field, Kind, Length};

impl Description {
    pub fn schema(&self) -> TokenStream {
        let Header { name, version, oldest, depth, .. } = &self.header;
        let (plain, parts) = self.parts();
        let fields = plain.iter().map(|field| field.schema());
        let parts = parts.iter().map(|field| field.part());
        let depth = option(depth.map(|(depth, _)| depth));
        quote! {
            fn schema_within(outer: ::std::option::Option<&::vmstate::Outer<'_>>) -> ::vmstate::Schema {
                let outer = &::vmstate::Outer::new::<Self>(outer);
                let _ = outer;
                ::vmstate::Schema {
                    name: #name,
                    version: #version,
                    oldest: #oldest,
                    depth: #depth,
                    fields: ::std::vec![#(#fields),*],
                    subsections: ::std::vec![
                        #(<#parts as ::vmstate::VmState>::schema_within(::std::option::Option::Some(outer))),*
                    ],
                }
            }
        }
    }
}

impl Field {
    fn schema(&self) -> TokenStream {
        let (name, versions) = (self.name(), &self.versions);
        let layout = match &self.kind {
            Kind::List { item, .. } => quote!(::vmstate::derived::list::schema::<#item>(&mut field, outer);),
            _ => {
                let layout = self.layout();
                quote!(#layout::schema(&mut field, outer);)
            }
        };
        let lengths = match &self.kind {
            Kind::Plain { max: Some(max) } | Kind::Count { max: Some(max), .. } => {
                let max = self.bound(max);
                quote!(field.max = ::std::option::Option::Some(#max);)
            }
            Kind::List { max, .. } => {
                quote!(field.max = ::std::option::Option::Some((#max) as usize as i128);)
            }
            Kind::Counted { length } => length.schema(),
            Kind::Rows { length, each, .. } => {
                let (length, each) = (length.schema(), each.schema());
                quote! {
                    let each = {
                        let mut field = <::vmstate::FieldSchema as ::std::default::Default>::default();
                        #each
                        field
                    };
                    field.each = ::std::option::Option::Some(::std::boxed::Box::new(each));
                    #length
                }
            }
            Kind::Plain { max: None } | Kind::Count { max: None, .. } | Kind::Subsection { .. } => {
                TokenStream::new()
            }
        };
        let min = option(self.min.as_ref().map(|min| self.bound(min)));
        let (since, until, equal) = (option(self.since), option(self.until), self.equal.is_some());
        quote! {{
            let mut field = ::vmstate::FieldSchema {
                name: #name,
                equal: #equal,
                min: #min,
                since: #since,
                until: #until,
                struct_versions: &[#(#versions),*],
                ..::std::default::Default::default()
            };
            #layout
            #lengths
            field
        }}
    }

    /// A bound as the schema holds it.
    fn bound(&self, bound: &Expr) -> TokenStream {
        let ty = &self.ty;
        quote_spanned!(ty.span()=> ::vmstate::derived::bound::<#ty>(#bound))
    }
}

impl Length {
    /// Statements that say it of `field`.
    fn schema(&self) -> TokenStream {
        let some_max = |max| quote!(field.max = ::std::option::Option::Some((#max) as usize as i128););
        match self {
            Length::Field { count, max } => {
                let (count, max) = (count.unraw().to_string(), some_max(max));
                quote!(field.count = ::std::option::Option::Some(#count); #max)
            }
            Length::Context { max, .. } => {
                let max = some_max(max);
                quote!(field.count_from_context = true; #max)
            }
            Length::Constant(constant) => quote!(::vmstate::derived::repeat(&mut field, #constant);),
        }
    }
}
